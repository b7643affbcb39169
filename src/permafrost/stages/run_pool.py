"""Train many runs, one after the other or in several processes."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any

from permafrost.artifacts import file_digest
from permafrost.errors import InputError
from permafrost.experiment import RunInputs, train_run
from permafrost.params import Params
from permafrost.paths import project_root
from permafrost.processes import (
    GRACE,
    deaf_children,
    stop_all,
    stop_on_signals,
    stop_with_parent,
)
from permafrost.ranking.method import frozen_masks
from permafrost.runs.spec import RunSpec
from permafrost.runs.store import RunStore
from permafrost.source import PACKAGE, PACKAGE_CODE
from permafrost.stages.shared import (
    FIRST,
    KNOWLEDGE,
    TASKS,
    progress_bar,
    refuse_changed,
    seed_file,
)
from permafrost.stages.workspace import Workspace, prepare_device
from permafrost.stopping import stop_if_requested
from permafrost.tensors import load_tasks, load_tensors

Records = dict[RunSpec, dict[str, Any]]


def run_inputs(seed: int) -> RunInputs:
    """Read what every run of a seed starts from."""
    tasks, first, known = (seed_file(folder, seed) for folder in (TASKS, FIRST, KNOWLEDGE))
    weights, _ = load_tensors(first)
    return RunInputs(
        load_tasks(tasks),
        file_digest(tasks),
        weights,
        file_digest(first),
        lambda: load_tensors(known)[0],
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
    records: Records = {}
    with progress_bar(title, len(specs)) as advance:
        for spec, record in _records(workspace, specs, on_validation):
            records[spec] = record
            advance(1)
    return records


def _records(
    workspace: Workspace, specs: list[RunSpec], on_validation: bool
) -> Iterator[tuple[RunSpec, dict[str, Any]]]:
    workers = min(workspace.params.sweep.workers, len(specs))
    if workers <= 1:
        for spec in specs:
            yield spec, _obtain(workspace, spec, on_validation)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(workspace.params,)
    )
    # The longest first, so that no worker is left alone with one at the end.
    longest = sorted(specs, key=lambda spec: -spec.hyperparameters.get("passes", 0))
    grace = GRACE
    try:
        with deaf_children():
            futures = {
                pool.submit(_obtain_in_worker, s, on_validation, PACKAGE_CODE): s for s in longest
            }
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            stop_if_requested()
            for future in done:
                yield futures[future], future.result()
        grace = 0.0  # they only wait for more
    except BrokenProcessPool:
        stop_if_requested()  # the signal may have ended a worker that had only begun
        raise InputError(
            "sweep.workers: one was killed, perhaps for want of memory; `dvc repro` goes on "
            "after the last epoch, or set fewer workers"
        ) from None
    finally:
        # Not left to the pool: it waits for ever if a worker is killed while all of them end.
        pool.shutdown(wait=False, cancel_futures=True)
        stop_all(set(multiprocessing.active_children()) - others, grace)


def _obtain(workspace: Workspace, spec: RunSpec, on_validation: bool) -> dict[str, Any]:
    stop_if_requested()
    masks = None
    if spec.metric is not None and spec.pct is not None:
        masks = frozen_masks(workspace.orders(spec.seed, spec.metric), spec.pct)
    inputs = _inputs(spec.seed)
    return train_run(
        workspace.store,
        workspace.params,
        spec,
        inputs.on_validation() if on_validation else inputs,
        masks,
        workspace.device,
    )


@lru_cache(maxsize=1)
def _inputs(seed: int) -> RunInputs:
    return run_inputs(seed)


_workspaces: list[Workspace] = []  # a worker's own


def _start_worker(params: Params) -> None:
    parent = multiprocessing.parent_process()
    assert parent
    stop_on_signals()
    stop_with_parent(int(parent.pid or 0))
    _workspaces.append(Workspace(params, prepare_device(params), RunStore(project_root())))


def _obtain_in_worker(spec: RunSpec, on_validation: bool, code: str) -> dict[str, Any]:
    refuse_changed(PACKAGE, "its stage", code != PACKAGE_CODE)  # a worker imports it anew
    return _obtain(_workspaces[0], spec, on_validation)
