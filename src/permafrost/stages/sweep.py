"""Stage sweep: every run of the comparison, from the same first-task checkpoints."""

import sys

from permafrost.artifacts import save_record
from permafrost.plan import sweep_runs, twins_of
from permafrost.stages.run_pool import train_runs
from permafrost.stages.shared import SWEEP, note_seconds
from permafrost.stages.tune import read_choices
from permafrost.stages.workspace import open_workspace


def run() -> None:
    """Write a row for each run, in the order that the params give.

    A run that diverges is a failed row and does not keep the others from being trained; stage
    report tells it in its tables and by its exit code.
    """
    with open_workspace("sweep") as workspace:
        specs = sweep_runs(workspace.params, read_choices(workspace.params))
        records = train_runs(workspace, specs, "sweep")
        rows = [records[spec]["row"] for spec in specs]
        if workspace.params.sweep.twins:
            # As names, so that stage report can pair them without PyTorch.
            controls = [[twin.name for twin in twins_of(spec)] for spec in specs]
            rows = [row | {"controlled_by": c} for row, c in zip(rows, controls, strict=True)]
        save_record(SWEEP, rows)
        times = {r["name"]: workspace.store.seconds(r["key"]) for r in records.values()}
        note_seconds("runs", {name: value for name, value in times.items() if value is not None})
        for record in records.values():
            if record["row"]["status"] == "failed":
                print(f"{record['name']} failed: {record['row']['error']}", file=sys.stderr)
        workspace.tell_unlogged(*records.values())
        print(f"sweep: {len(specs)} runs")
