"""Variants: the summary of one choice of filters over all seeds, as MLflow shows it."""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from permafrost.artifacts import load_record, save_record, write_atomically
from permafrost.evaluation import share
from permafrost.params import Params
from permafrost.processes import project_lock
from permafrost.runs.spec import RunSpec
from permafrost.runs.stored import StoredRuns
from permafrost.shown import shown_params
from permafrost.tracking import VARIANTS, RunRecord, Tracker, machine_tags

if TYPE_CHECKING:
    from permafrost.models import Head

_RECORD, _PICTURES = "variant.json", "pictures"


def variant_spec(params: Params, seed: int) -> RunSpec:
    """Return the run that ``freeze.metric`` and ``freeze.pct`` name."""
    freeze = params.freeze
    return RunSpec("freeze", seed, cast("Head", params.model.head), freeze.metric, freeze.pct)


def variant_key(summary: dict[str, Any]) -> str:
    """Return the key of a variant: it is named by its runs."""
    keys = json.dumps([row["key"] for row in summary["seeds"]])
    return hashlib.sha256(keys.encode()).hexdigest()[:32]


def variant_record(
    params: Params, summary: dict[str, Any], shown: dict[str, Any]
) -> dict[str, Any]:
    """Return what is kept of a variant, but for its machine."""
    variant = summary["seeds"][0]
    return {
        "key": variant_key(summary),
        "name": f"{variant['metric']} {share(variant['pct'])}",
        "params": {**shown, "seed": params.seeds, "profile": params.profile},
        "summary": summary,
    }


def store_variant(tracker: Tracker, params: Params, summary: dict[str, Any]) -> None:
    """Keep a variant's summary and log it as one run.

    Parameters
    ----------
    tracker : Tracker
        Of the project.
    params : Params
        All parameters.
    summary : dict
        As in ``metrics/variant.json``.
    """
    first = summary["seeds"][0]
    shown, machine = shown_params(params, RunSpec.of(first)), {}
    if trained := StoredRuns(tracker.root).result(first["key"]):  # it knows its machine
        shown, machine = trained["record"]["params"] | shown, trained["machine"]
    record = variant_record(params, summary, shown) | {"machine": machine}
    name = os.environ.get("DVC_EXP_NAME")
    record["name"] += f" ({name})" if name else ""
    key = variant_key(summary)
    with project_lock(tracker.root, key):  # two experiments may have the same variant
        save_record(_folder(tracker.root, key) / _RECORD, record)
        tracker.write(_stored_run(_folder(tracker.root, key)))


def add_pictures(tracker: Tracker, summary: dict[str, Any], pictures: dict[str, Path]) -> None:
    """Add pictures and tables to a variant's run.

    Parameters
    ----------
    tracker : Tracker
        Of the project.
    summary : dict
        As in ``metrics/variant.json``.
    pictures : dict of str to Path
        Place in the run to file.
    """
    key = variant_key(summary)
    folder = _folder(tracker.root, key)
    if not (folder / _RECORD).exists():
        return
    with project_lock(tracker.root, key):
        for place, path in pictures.items():
            write_atomically(folder / _PICTURES / place, path.read_bytes())
        tracker.write(_stored_run(folder))


def variant_records(root: Path) -> list[RunRecord]:
    """Return the runs of all variants that were evaluated in this project."""
    return [_stored_run(path.parent) for path in variant_files(root)]


def variant_files(root: Path) -> list[Path]:
    """Return the stored summaries of a project's variants."""
    return sorted((root / ".permafrost" / "variants").glob(f"*/{_RECORD}"))


def _folder(root: Path, key: str) -> Path:
    return root / ".permafrost" / "variants" / key


def _stored_run(folder: Path) -> RunRecord:
    pictures = folder / _PICTURES
    paths = sorted(path for path in pictures.rglob("*") if path.is_file())
    return variant_run(
        load_record(folder / _RECORD), {str(path.relative_to(pictures)): path for path in paths}
    )


def variant_run(
    record: dict[str, Any], pictures: dict[str, Path], *, partial: bool = False
) -> RunRecord:
    """Return what MLflow holds of a variant."""
    metrics = {}
    for name, value in record["summary"].items():
        if isinstance(value, dict) and "mean" in value:
            metrics[name] = value["mean"]
            bounds = {f"{name}_{bound}": value[bound] for bound in ("low", "high")}
            metrics |= {bound: number for bound, number in bounds.items() if number is not None}
    return RunRecord(
        key=record["key"],
        experiment=VARIANTS,
        name=record["name"],
        params=record["params"],
        metrics=metrics,
        pictures=pictures,
        tags={"kind": "variant"} | machine_tags(record.get("machine", {})),
        partial=partial,
    )
