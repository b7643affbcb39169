"""Train many runs, one after the other or in several processes."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from permafrost.artifacts import file_digest
from permafrost.experiment import RunInputs
from permafrost.first_weights import first_weights, weights_path
from permafrost.hyper import number
from permafrost.jobs import RunJob
from permafrost.ranking.method import frozen_masks
from permafrost.runs.executors import Executor, Processes, Serial
from permafrost.runs.spec import RunSpec
from permafrost.stages.shared import (
    FIRST,
    KNOWLEDGE,
    TASKS,
    progress_bar,
    seed_file,
)
from permafrost.stages.workspace import Workspace
from permafrost.tensors import load_tasks, load_tensors

Records = dict[RunSpec, dict[str, Any]]


def run_inputs(seed: int, weights: Path | None) -> RunInputs:
    """Read what every run of a seed starts from.

    Parameters
    ----------
    seed : int
        The seed.
    weights : Path or None
        The file of the weights that its network began with, if there is one.
    """
    tasks, first, known = (seed_file(folder, seed) for folder in (TASKS, FIRST, KNOWLEDGE))
    learned, _ = load_tensors(first)
    return RunInputs(
        load_tasks(tasks),
        file_digest(tasks),
        learned,
        file_digest(first),
        lambda: load_tensors(known)[0],
        first_weights(weights),
    )


def train_runs(
    workspace: Workspace, specs: list[RunSpec], title: str, *, on_validation: bool = False
) -> Records:
    """Train runs, or find them stored; return each one's record.

    Parameters
    ----------
    workspace : Workspace
        Of the stage.
    specs : list of RunSpec
        Which runs.
    title : str
        Of the progress bar.
    on_validation : bool
        Whether they are measured on the validation images; the test images are then never seen.
    """
    # The longest first, so that no worker is left alone with one at the end.
    longest = sorted(specs, key=lambda spec: -number(spec.hyperparameters, "passes"))
    jobs = [_job(workspace, spec, on_validation) for spec in longest]
    records: Records = {}
    with progress_bar(title, len(jobs)) as advance:
        for place, record in _executor(workspace, len(jobs)).map(jobs):
            records[longest[place]] = record
            advance(1)
    return records


def _executor(workspace: Workspace, jobs: int) -> Executor:
    if min(workspace.params.sweep.workers, jobs) <= 1:
        return Serial(workspace.store, workspace.device)
    threads = workspace.params.runtime.threads
    return Processes(workspace.store.root, workspace.worker_devices, threads)


def _job(workspace: Workspace, spec: RunSpec, on_validation: bool) -> RunJob:
    params, masks = workspace.params, None
    if spec.metric is not None:
        masks = workspace.orders(spec.seed, spec.metric)
        masks = masks if spec.pct is None else frozen_masks(masks, spec.pct)
    read_inputs = partial(_inputs, spec.seed, weights_path(params), on_validation)
    return RunJob(params, spec, read_inputs, masks)


@lru_cache(maxsize=1)
def _inputs(seed: int, weights: Path | None, on_validation: bool) -> RunInputs:
    inputs = run_inputs(seed, weights)
    return inputs.on_validation() if on_validation else inputs
