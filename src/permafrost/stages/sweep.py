"""Stage sweep: every cell of the comparison, from the same first-task checkpoints."""

import sys

from permafrost.artifacts import save_record
from permafrost.plan import sweep_cells
from permafrost.stages.cell_pool import train_cells
from permafrost.stages.tune import read_choices
from permafrost.stages.workspace import SWEEP, note_seconds, open_stage


def run() -> None:
    """Write a row for each cell, in the order that the params give.

    A cell that diverges is a failed row and does not keep the others from being trained; stage
    report tells it in its tables and by its exit code.
    """
    with open_stage("sweep") as workspace:
        specs = sweep_cells(workspace.params, read_choices(workspace.params))
        records = train_cells(workspace, specs, "sweep")
        save_record(SWEEP, [records[spec]["row"] for spec in specs])
        times = {r["name"]: workspace.store.seconds(r["key"]) for r in records.values()}
        note_seconds("cells", {name: value for name, value in times.items() if value is not None})
        for record in records.values():
            if record["row"]["status"] == "failed":
                print(f"{record['name']} failed: {record['row']['error']}", file=sys.stderr)
        workspace.tell_unlogged(*records.values())
        print(f"sweep: {len(specs)} cells")
