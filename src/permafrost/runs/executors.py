"""Who trains many runs: this process, several of this machine, or an engine of one's own.

An engine that shares no disk with the project pickles each :class:`permafrost.jobs.RunJob`, its
inputs read by ``by_content()``, and calls ``perform_apart`` where it arrives: with this version of
the package installed and the project's ``custom`` in the working folder. What that returns it sends
back, and the project's :meth:`RunStore.adopt` stores and logs it.
"""

import multiprocessing
import os
import pickle
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from permafrost.devices import prepare_device
from permafrost.errors import InputError
from permafrost.processes import (
    GRACE,
    deaf_children,
    stop_all,
    stop_on_signals,
    stop_with_parent,
)
from permafrost.runs.store import RunStore
from permafrost.stopping import Stopped, stop_if_requested

Record = dict[str, Any]

_TRIES = 2  # of a run whose worker is killed


class Job(Protocol):
    """A run with all that it needs: a value that can be pickled."""

    @property
    def name(self) -> str:
        """Return its name for people."""

    def perform(self, store: RunStore, device: torch.device) -> Record:
        """Train it on a device, or find it stored; return its record."""


class Executor(Protocol):
    """Has jobs performed."""

    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Record]]:
        """Yield each job's place and its record as it is done, in any order."""


@dataclass(frozen=True)
class Serial:
    """One job after the other, in this process.

    Attributes
    ----------
    store : RunStore
        Where runs lie.
    device : torch.device
        Where to train.
    """

    store: RunStore
    device: torch.device

    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Record]]:
        """Yield each job's place and its record, in order."""
        for place, job in enumerate(jobs):
            stop_if_requested()
            yield place, job.perform(self.store, self.device)


@dataclass(frozen=True)
class Processes:
    """Jobs in processes of this machine, each with a device, which work on one store.

    Attributes
    ----------
    root : Path
        The project's.
    devices : sequence of torch.device
        Of each process.
    threads : int
        Of each process, on the CPU.
    """

    root: Path
    devices: Sequence[torch.device]
    threads: int

    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Record]]:
        """Yield each job's place and its record as it is done.

        A process that is killed is replaced, and its job goes on after the last epoch.

        Raises
        ------
        InputError
            If the process of the same job is killed again.
        """
        others = set(multiprocessing.active_children())
        workers = [_Worker(self.root, device, self.threads) for device in self.devices[: len(jobs)]]
        waiting, idle = deque(range(len(jobs))), deque(workers)
        at_work: dict[Future[Record], tuple[int, _Worker]] = {}
        tries: Counter[int] = Counter()
        grace = GRACE
        try:
            while waiting or at_work:
                while waiting and idle:
                    place, worker = waiting.popleft(), idle.popleft()
                    tries[place] += 1
                    at_work[worker.begin(jobs[place])] = place, worker
                done, _ = wait(at_work, timeout=0.2, return_when=FIRST_COMPLETED)
                stop_if_requested()
                for future in done:
                    place, worker = at_work.pop(future)
                    idle.append(worker)
                    if _was_killed(future):
                        _tell_killed(jobs[place], tries[place])
                        worker.replace()
                        waiting.appendleft(place)
                    else:
                        yield place, future.result()
            grace = 0.0  # they only wait for more
        finally:
            for worker in workers:
                worker.leave()
            stop_all(set(multiprocessing.active_children()) - others, grace)


class _Worker:
    """One process, and the next one if it is killed."""

    def __init__(self, *place: Any) -> None:
        self._place = place
        self._pool = _start()

    def begin(self, job: Job) -> "Future[Record]":
        # As bytes: torch would have tensors shared, which takes memory that containers lack.
        job_bytes = pickle.dumps(job)
        with deaf_children():
            try:
                return self._pool.submit(_perform, job_bytes, *self._place)
            except BrokenProcessPool:  # killed while it had nothing to do
                self.replace()
                return self._pool.submit(_perform, job_bytes, *self._place)

    def replace(self) -> None:
        self.leave()
        self._pool = _start()

    def leave(self) -> None:
        """Let go of the pool, which would wait for ever for one that is killed as it ends."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _start() -> ProcessPoolExecutor:
    # Read as PyTorch is loaded: threads of several workers on the same cores must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = multiprocessing.get_context("spawn")  # torch's threads survive no fork
    return ProcessPoolExecutor(1, mp_context=context, initializer=_begin)


def _was_killed(future: "Future[Record]") -> bool:
    """Return whether a job's process was killed or asked to end; else it is done, or raises."""
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        return error.__cause__ is None  # or it raised what cannot be read here
    return isinstance(error, Stopped)


def _tell_killed(job: Job, tries: int) -> None:
    if tries == _TRIES:
        raise InputError(
            f"sweep.workers: that of {job.name} was killed {_TRIES} times, perhaps for want of "
            "memory; `dvc repro` goes on after the last epoch, or set fewer workers"
        )
    print(
        f"{job.name}: its worker was killed; another one goes on with it",
        file=sys.stderr,
    )


def _begin() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    stop_on_signals()
    stop_with_parent(int(parent.pid or 0))


def _perform(job: bytes, *place: Any) -> Record:
    received: Job = pickle.loads(job)
    return received.perform(*_prepared(*place))


@cache
def _prepared(root: Path, device: torch.device, threads: int) -> tuple[RunStore, torch.device]:
    # Not when the worker begins: what is raised there, as by a card that is full, is not told.
    return RunStore(root), prepare_device(str(device), threads)
