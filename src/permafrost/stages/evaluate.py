"""Stage evaluate: what the variant keeps and learns, over the seeds."""

from dataclasses import asdict
from typing import Any

from permafrost.artifacts import load_record, save_json, save_record
from permafrost.evaluation import Interval, accuracy_name, confidence_interval, value_range
from permafrost.params import Params
from permafrost.paths import project_root
from permafrost.stages.shared import SECOND_RECORDS, VARIANT, VARIANT_CURVES, open_stage, seed_file
from permafrost.tables import percent
from permafrost.tracking import Tracker
from permafrost.variants import store_variant


def summarise(rows: list[dict[str, Any]], params: Params) -> dict[str, Any]:
    """Return the mean and the 95% interval of each measure, and a row for each seed."""
    tasks = [accuracy_name(task) for task in range(len(params.split.sizes))]
    measures = ["acc_task1_before", *tasks, "acc_mean", "forgetting"]
    summary: dict[str, Any] = {
        name: asdict(confidence_interval([row[name] for row in rows], value_range(name)))
        for name in measures
    }
    return summary | {"seeds": rows}


def run() -> None:
    """Write the variant's summary and its curves, and log it to MLflow."""
    with open_stage("evaluate") as params:
        records = [load_record(seed_file(SECOND_RECORDS, seed, ".json")) for seed in params.seeds]
        summary = summarise([record["row"] for record in records], params)
        save_record(VARIANT, summary)
        save_json(
            VARIANT_CURVES,
            [
                {
                    "seed": seed,
                    "epoch": epoch,
                    "task": name.removeprefix("acc_task"),
                    "accuracy": row[name],
                }
                for seed, record in zip(params.seeds, records, strict=True)
                for epoch, row in enumerate(record["history"], start=1)  # numbered through
                for name in (accuracy_name(task) for task in range(len(params.split.sizes)))
                if name in row
            ],
        )
        store_variant(Tracker(project_root()), params, summary)
        for name, interval in summary.items():
            if name != "seeds":
                print(f"{name:17} {percent(Interval(**interval))}")
