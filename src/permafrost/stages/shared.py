"""What all stages share: where files lie, params, timings and progress."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from permafrost import __version__
from permafrost.artifacts import load_arrays, load_json, require, save_json
from permafrost.errors import InputError, printable
from permafrost.params import Params, load_params
from permafrost.paths import project_root
from permafrost.processes import project_lock
from permafrost.registry import find_custom
from permafrost.source import PACKAGE, PACKAGE_CODE, code_digest

PARAMS = Path("params.yaml")
TASKS = Path("data/tasks")
FIRST = Path("models/train_first")
INTEGRALS = Path("models/path_integral")
FIRST_RECORDS = Path("metrics/train_first")
SALIENCY = Path("models/saliency")
SALIENCY_PICTURES = Path("reports/saliency")
FILTERS = Path("models/visualize")
FILTER_PICTURES = Path("reports/visualize")
RANKS = Path("models/rank")
RANK_PICTURES = Path("reports/rank")
FROZEN = Path("models/freeze")
KNOWLEDGE = Path("models/consolidate")
SECOND = Path("models/train_second")
SECOND_RECORDS = Path("metrics/train_second")
VARIANT = Path("metrics/variant.json")
VARIANT_CURVES = Path("reports/plots/variant_epochs.json")
TUNE = Path("metrics/tune.json")
TRIALS = Path("metrics/trials.json")
SWEEP = Path("metrics/sweep.json")
COMPARISON = Path("metrics/comparison.json")
TABLES = Path("reports/tables.md")
CLAIMS = Path("reports/claims.md")
PAGE = Path("reports/index.html")
STABILITY = Path("metrics/stability.json")
STABILITY_TABLE = Path("reports/stability.md")
TRADE_OFF_PICTURE = Path("reports/kept_and_learned.png")
TRADE_OFF_POINTS = Path("reports/plots/kept_and_learned.json")
TIMINGS = Path("reports/timings.json")

# In a project without the package's source: the version that DVC sees in its place.
VERSION = Path("permafrost.version")
SUMMARIES = (VARIANT, TUNE, COMPARISON)  # small, and in git

SOURCE, _CUSTOM = Path("src/permafrost"), Path("custom")
_OUTPUTS = (TASKS, Path("models"), Path("metrics"), Path("reports"))
_SEED_OUTPUTS = (
    TASKS,
    FIRST,
    INTEGRALS,
    FIRST_RECORDS,
    SALIENCY,
    SALIENCY_PICTURES,
    FILTERS,
    FILTER_PICTURES,
    RANKS,
    RANK_PICTURES,
    FROZEN,
    KNOWLEDGE,
    SECOND,
    SECOND_RECORDS,
)


def seed_file(folder: Path, seed: int, suffix: str = ".safetensors") -> Path:
    """Return a stage's file of one seed."""
    return folder / f"{seed}{suffix}"


def variant_pictures(params: Params, root: Path = Path()) -> dict[str, Path]:
    """Return the pictures of a variant for MLflow: place in the run to file."""
    pictures = {path.name: root / path for path in (PAGE, TABLES, TRADE_OFF_PICTURE)}
    for seed in params.seeds:
        for stage, folder in (("saliency", SALIENCY_PICTURES), ("rank", RANK_PICTURES)):
            pictures[f"{stage}/{seed}.png"] = seed_file(root / folder, seed, ".png")
        for path in sorted((root / FILTER_PICTURES / str(seed)).glob("*.png")):
            pictures[f"filters/{seed}/{path.name}"] = path
    return pictures


def read_orders(seed: int, metric: str) -> dict[str, list[int]]:
    """Return the order of every layer's filters by one metric.

    Raises
    ------
    InputError
        If the ranking is damaged or of another metric.
    """
    path = seed_file(RANKS, seed)
    orders = {}
    for name, values in load_arrays(path)[0].items():
        if name.startswith(f"{metric}/") and name.endswith("/order"):
            order = orders[name[len(metric) + 1 : -len("/order")]] = values.tolist()
            require(sorted(order) == list(range(len(order))), path, f"{name} is no order")
    require(len(orders) > 0, path, f"has no ranking by {metric}")
    return orders


def read_params() -> Params:
    """Read params.yaml; a user's own metrics are found from the project's folder."""
    find_custom(Path.cwd())
    return load_params(PARAMS)


@contextmanager
def open_stage(stage: str, seed: int | None = None) -> Iterator[Params]:
    """Prepare a stage, and note how long it took in ``reports/timings.json``.

    Stages that compute open a :class:`permafrost.stages.workspace.Workspace`.

    Parameters
    ----------
    stage : str
        Its name in dvc.yaml.
    seed : int, optional
        Of a stage that runs for each seed.

    Yields
    ------
    Params
        Valid, but for what they name.

    Raises
    ------
    InputError
        If params.yaml is wrong, the code is not this copy's, or of another version than it names,
        or one of them was changed meanwhile.
    """
    began = time.perf_counter()
    custom = code_digest(_CUSTOM)
    params = read_params()
    if seed is not None and seed not in params.seeds:
        raise InputError(f"--seed: {seed} is none of seeds: {', '.join(map(str, params.seeds))}")
    _refuse_other_code(stage)
    _refuse_other_version()
    _remove_leftovers()
    _remove_other_seeds(params)
    yield params
    # DVC would note what was computed as of the new ones.
    refuse_changed(PARAMS, stage, read_params() != params)
    refuse_changed(SOURCE, stage, _is_other_code())
    refuse_changed(_CUSTOM, stage, code_digest(_CUSTOM) != custom)
    name = stage if seed is None else f"{stage}@{seed}"
    note_seconds("stages", {name: time.perf_counter() - began})


def refuse_changed(path: Path, stage: str, is_changed: bool) -> None:
    """Refuse what a stage has computed of a file, or of a folder, that is no longer the same."""
    if is_changed:
        raise InputError(f"{path}: was changed while {stage} ran; run `dvc repro` again")


def _is_other_code() -> bool:
    """Return whether DVC sees other code than was imported."""
    return SOURCE.is_dir() and code_digest(SOURCE) != PACKAGE_CODE


def _refuse_other_code(stage: str) -> None:
    """Refuse to run other code than DVC sees, as that of a queued copy may be."""
    if _is_other_code():
        refuse_changed(SOURCE, stage, SOURCE.samefile(PACKAGE))
        raise InputError(
            f"{SOURCE}: is not the code that runs, which is {PACKAGE}; activate this copy's own "
            "environment, or `git add` what is new and queue the experiment again"
        )


def _refuse_other_version() -> None:
    """Refuse to run another version than DVC sees."""
    noted = VERSION.read_text(errors="replace").strip() if VERSION.exists() else __version__
    if noted != __version__:
        raise InputError(
            f"{VERSION}: names {printable(noted)}, but {__version__} runs; `permafrost check` "
            "renews it"
        )


def _remove_leftovers() -> None:
    """Delete what a killed DVC, or one without space, left of the outputs that it was copying.

    In a folder of outputs it would be taken for one of them.
    """
    for folder in _OUTPUTS:
        for path in folder.rglob("*.tmp"):
            if re.search(r"\.[\w-]{22}\.tmp$", path.name) and _is_idle(path):
                path.unlink(missing_ok=True)


def _remove_other_seeds(params: Params) -> None:
    """Delete what is of seeds that are none any more, which DVC no longer owns.

    A stage that depends on a folder depends on all in it: ``dvc.lock`` would note files that no
    clone gets. DVC's cache keeps them for when the seeds are back.
    """
    kept = {str(seed) for seed in params.seeds}
    for folder in _SEED_OUTPUTS:
        for path in folder.glob("*"):
            if path.stem.isdecimal() and path.stem not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_idle(path: Path) -> bool:
    """Return whether nobody, such as another DVC, has written to a file for two seconds."""
    try:
        return time.time() - path.stat().st_mtime > 2
    except FileNotFoundError:
        return False


def note_seconds(group: str, seconds: dict[str, float]) -> None:
    """Merge durations into ``reports/timings.json``."""
    with project_lock(project_root(), "timings"):
        timings = read_timings()
        rounded = {name: round(value, 2) for name, value in seconds.items()}
        timings[group] = timings.get(group, {}) | rounded
        save_json(TIMINGS, timings)


def read_timings() -> dict[str, dict[str, float]]:
    """Read ``reports/timings.json``; where there is none, or it is damaged, nothing is known."""
    try:
        timings = load_json(TIMINGS)
    except InputError:
        return {}
    groups = timings.values() if isinstance(timings, dict) else [None]
    return timings if all(isinstance(group, dict) for group in groups) else {}


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with an estimate of the time left; show nothing where there is no terminal.

    Yields
    ------
    callable
        Told how many of the ``total`` steps were just done.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda steps: progress.advance(task, steps)
