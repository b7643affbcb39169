"""Who trains many runs: this process, several of this machine, or an engine of one's own.

An engine that shares no disk with the project sends each job :meth:`~RunJob.by_content`, calls
:meth:`~RunJob.perform_apart` where it arrives, sends back what that returns, and has the project's
store :meth:`~permafrost.runs.store.RunStore.adopt` it.
"""

import multiprocessing
import pickle
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
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
from permafrost.stopping import stop_if_requested

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
                    try:
                        record = future.result()
                    except BrokenProcessPool:
                        _tell_killed(jobs[place], tries[place])
                        worker.replace()
                        waiting.appendleft(place)
                    else:
                        yield place, record
            grace = 0.0  # they only wait for more
        finally:
            for worker in workers:
                worker.leave()
            stop_all(set(multiprocessing.active_children()) - others, grace)


class _Worker:
    """One process, and the next one if it is killed."""

    def __init__(self, *place: Any) -> None:
        self._place = place
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),  # torch's threads survive no fork
            initializer=_begin,
            initargs=self._place,
        )

    def begin(self, job: Job) -> "Future[Record]":
        # As bytes: torch would have tensors shared, which takes memory that containers lack.
        with deaf_children():
            return self._pool.submit(_perform, pickle.dumps(job))

    def replace(self) -> None:
        self.leave()
        self._pool = self._start()

    def leave(self) -> None:
        """Let go of the pool, which would wait for ever for one that is killed as it ends."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _tell_killed(job: Job, tries: int) -> None:
    if tries == _TRIES:
        raise InputError(
            f"sweep.workers: that of {job.name} was killed {_TRIES} times, perhaps for want of "
            "memory; `dvc repro` goes on after the last epoch, or set fewer workers"
        ) from None
    print(
        f"{job.name}: its worker was killed; another one goes on after the last epoch",
        file=sys.stderr,
    )


_own: list[tuple[RunStore, torch.device]] = []  # a worker's


def _begin(root: Path, device: torch.device, threads: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent
    stop_on_signals()
    stop_with_parent(int(parent.pid or 0))
    _own.append((RunStore(root), prepare_device(str(device), threads)))


def _perform(job: bytes) -> Record:
    store, device = _own[0]
    received: Job = pickle.loads(job)
    return received.perform(store, device)
