"""The runs of MLflow that the stages' outputs tell of, for trainings that are not stored here.

DVC brings outputs from elsewhere. They hold less than the store: no machine, and the curves of the
first tasks and of the variant only. ``dvc.lock`` has the parameters that they were made with.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from permafrost.artifacts import load_record
from permafrost.curves import curve_records
from permafrost.errors import InputError
from permafrost.experiment import shown_params, shown_training
from permafrost.params import Params, validate_params
from permafrost.registry import find_custom
from permafrost.runs.spec import RunSpec
from permafrost.runs.store import run_record
from permafrost.stages.shared import (
    FIRST_RECORDS,
    PARAMS,
    SECOND_RECORDS,
    SWEEP,
    TRIALS,
    VARIANT,
    variant_pictures,
)
from permafrost.tracking import RunRecord
from permafrost.variants import variant_key, variant_record, variant_run

_LOCK = Path("dvc.lock")

Record = dict[str, Any]


def runs_of_outputs(root: Path, known: set[str]) -> list[RunRecord]:
    """Return the runs that the outputs in ``metrics/`` tell of.

    Parameters
    ----------
    root : Path
        The project's.
    known : set of str
        The keys of which more is known; they are left out.

    Raises
    ------
    InputError
        If an output or ``dvc.lock`` is damaged, or of another version.
    """
    locked = _read_lock(root)
    find_custom(root)
    params = cache(lambda stage: _params_of(locked, stage))
    runs: dict[str, RunRecord] = {}
    for stage, record in _records(root):
        if stage in locked and record["key"] not in known | runs.keys():
            runs[record["key"]] = _run(root, record, params(stage))
    return list(runs.values())


def curves_of_outputs(root: Path) -> list[RunRecord]:
    """Return the comparison's curves, of the parameters with which it was made.

    Raises
    ------
    InputError
        As :func:`runs_of_outputs`.
    """
    locked = _read_lock(root)
    find_custom(root)
    if "sweep" not in locked or not (root / SWEEP).exists():
        return []
    return curve_records(load_record(root / SWEEP), _params_of(locked, "sweep"))


def _records(root: Path) -> Iterator[tuple[str, Record]]:
    """Return what is known of each training and of the variant; first where most is."""
    for stage, folder in (("train_first", FIRST_RECORDS), ("train_second", SECOND_RECORDS)):
        for path in sorted((root / folder).glob("*.json")):
            yield f"{stage}@{path.stem}", load_record(path) | {"seed": int(path.stem)}
    for row in _read(root / SWEEP, []):
        yield "sweep", {"key": row["key"], "kind": "cell", "row": row}
    for row in _read(root / TRIALS, {"trials": []})["trials"]:
        yield "tune", {"key": row["key"], "kind": "trial", "row": row}
    if summary := _read(root / VARIANT, {}):
        yield "evaluate", {"key": variant_key(summary), "kind": "variant", "summary": summary}


def _run(root: Path, record: Record, params: Params) -> RunRecord:
    if record["kind"] == "first_task":
        shown = {"seed": record["seed"]} | shown_training(params)
        return run_record(record | {"params": shown}, {}, partial=True)
    if record["kind"] == "variant":
        summary = record["summary"]
        shown = shown_params(params, RunSpec.of(summary["seeds"][0]))
        pictures = variant_pictures(params, root).items()
        there = {place: path for place, path in pictures if path.exists()}
        return variant_run(variant_record(params, summary, shown), there, partial=True)
    spec = RunSpec.of(record["row"])
    about = {"name": spec.name, "params": shown_params(params, spec)}
    return run_record(record | about, {}, partial=True)


def _read(path: Path, default: Any) -> Any:
    return load_record(path) if path.exists() else default


def _read_lock(root: Path) -> dict[str, Record]:
    """Return DVC's notes of each stage."""
    if not (root / _LOCK).exists():
        return {}
    try:
        stages = YAML(typ="safe", pure=True).load((root / _LOCK).read_text())["stages"]
        return {name: stage for name, stage in stages.items() if isinstance(stage, dict)}
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{_LOCK}: is none of DVC's; delete it, then run `dvc repro`") from None


def _params_of(locked: dict[str, Record], stage: str) -> Params:
    """Return the parameters that a stage's outputs were made with, as far as DVC notes them."""
    values: Record = {}
    for noted in [*locked.values(), locked[stage]]:  # its own last, should others differ
        for name, value in noted.get("params", {}).get(str(PARAMS), {}).items():
            *sections, key = name.split(".")
            section = values
            for part in sections:
                section = section.setdefault(part, {})
            section[key] = deepcopy(value)
    return validate_params(values, str(_LOCK))
