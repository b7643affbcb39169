"""Stage sweep: every cell of the comparison, from the same first-task checkpoints."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from typing import Any

from permafrost.artifacts import save_json
from permafrost.cells import CellStore
from permafrost.experiment import CellInputs, CellSpec, frozen_masks, sweep_cells, train_cell
from permafrost.params import Params
from permafrost.stages.train_second import cell_inputs
from permafrost.stages.workspace import (
    SWEEP,
    Workspace,
    note_seconds,
    open_stage,
    prepare_device,
    progress_bar,
    project_root,
    read_params,
)


def run() -> None:
    """Write a row for each cell, in the order that the params give."""
    with open_stage("sweep") as workspace:
        specs = sweep_cells(workspace.params)
        records: dict[CellSpec, dict[str, Any]] = {}
        with progress_bar("sweep", len(specs)) as advance:
            for spec, record in _records(workspace, specs):
                records[spec] = record
                advance(1)
        save_json(SWEEP, [records[spec]["row"] for spec in specs])
        store = workspace.store
        note_seconds(
            "cells", {record["name"]: store.seconds(record["key"]) for record in records.values()}
        )
        print(f"sweep: {len(specs)} cells")


def _records(
    workspace: Workspace, specs: list[CellSpec]
) -> Iterator[tuple[CellSpec, dict[str, Any]]]:
    """Yield each cell's record as it is done."""
    workers = min(workspace.params.sweep.workers, len(specs))
    if workers == 1:
        for spec in specs:
            yield spec, _obtain(workspace, spec)
        return
    # The database is made before several processes write into it.
    workspace.store.tracker.prepare()
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        # The longest first, so that no worker is left alone with one at the end.
        longest_first = sorted(specs, key=lambda spec: -(spec.passes or 0))
        futures = {pool.submit(_obtain_in_worker, spec): spec for spec in longest_first}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _obtain(workspace: Workspace, spec: CellSpec) -> dict[str, Any]:
    masks = None
    if spec.metric is not None and spec.pct is not None:
        masks = frozen_masks(workspace.orders(spec.seed, spec.metric), spec.pct)
    inputs = _inputs(spec.seed)
    return train_cell(workspace.store, workspace.params, spec, inputs, masks, workspace.device)


@lru_cache(maxsize=1)
def _inputs(seed: int) -> CellInputs:
    return cell_inputs(seed)


@lru_cache(maxsize=1)
def _worker_workspace() -> Workspace:
    params: Params = read_params()
    return Workspace(params, prepare_device(params), CellStore(project_root()))


def _obtain_in_worker(spec: CellSpec) -> dict[str, Any]:
    return _obtain(_worker_workspace(), spec)
