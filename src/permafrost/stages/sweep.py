"""Stage sweep: every cell of the comparison, from the same first-task checkpoints."""

import sys

from permafrost.artifacts import save_json
from permafrost.plan import sweep_cells
from permafrost.stages.cell_pool import train_cells
from permafrost.stages.tune import read_choices
from permafrost.stages.workspace import SWEEP, note_seconds, open_stage


def run() -> None:
    """Write a row for each cell, in the order that the params give."""
    with open_stage("sweep") as workspace:
        specs = sweep_cells(workspace.params, read_choices(workspace.params))
        records = train_cells(workspace, specs, "sweep")
        save_json(SWEEP, [records[spec]["row"] for spec in specs])
        store = workspace.store
        note_seconds(
            "cells", {record["name"]: store.seconds(record["key"]) for record in records.values()}
        )
        for record in records.values():
            if record["row"]["status"] == "failed":
                print(f"{record['name']} failed: {record['row']['error']}", file=sys.stderr)
        print(f"sweep: {len(specs)} cells")
