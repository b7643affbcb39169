"""Runs sent to other processes, and to where the project's files are not."""

import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from permafrost.errors import InputError
from permafrost.experiment import knowledge_name
from permafrost.jobs import RunJob
from permafrost.runs import key
from permafrost.runs.executors import Processes, Serial
from permafrost.runs.store import RunStore
from permafrost.stopping import stop_if_requested
from permafrost.strategies import STRATEGIES
from project import wait_for
from small_runs import CPU, EWC, FINETUNE, FREEZE, MASKS, make_params

# As an engine's worker: no project, nothing but the package and what arrives.
ELSEWHERE = """
import pickle, sys
import torch
job = pickle.loads(sys.stdin.buffer.read())
sys.stdout.buffer.write(pickle.dumps(job.perform_apart(torch.device("cpu"))))
"""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Without a folder custom, as elsewhere."""
    monkeypatch.chdir(tmp_path)
    key._sources.cache_clear()
    yield
    key._sources.cache_clear()


def elsewhere(job: RunJob, folder: Path):
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=pickle.dumps(job.by_content()),
        cwd=folder,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert not [*folder.iterdir()]
    return pickle.loads(done.stdout)


def weights_of(store, record):
    return store.model_path(record["key"]).read_bytes()


@pytest.mark.parametrize("spec", [FREEZE, EWC])
def test_a_run_sent_by_content_returns_whole(tmp_path, informed, make_store, monkeypatch, spec):
    job = RunJob(make_params(), spec, lambda: informed, MASKS if spec is FREEZE else None)
    here, there = make_store("here"), make_store("there")
    record = job.perform(here, CPU)
    finished = elsewhere(job, tmp_path / "elsewhere")
    assert there.adopt(finished) == record
    assert weights_of(there, record) == weights_of(here, record)
    assert there.adopt(finished) == record
    (live,), (written,) = here.tracker.runs, there.tracker.written
    assert written == live.result
    # As if it had been trained here.
    assert job.perform(there, CPU) == record
    assert not there.tracker.runs
    # By other code than is here, by now.
    monkeypatch.setitem(key._sources(), "permafrost.runs.further_tasks", "edited = True\n")
    with pytest.raises(InputError, match="was trained by other code than is here"):
        make_store("edited").adopt(finished)


def test_a_run_takes_only_what_its_strategy_needs(informed):
    sent = [
        RunJob(make_params(), spec, lambda: informed, None).by_content() for spec in (FINETUNE, EWC)
    ]
    known = [job.read_inputs().read_knowledge() for job in sent]
    assert known[0] == {}
    assert known[1].keys() < informed.read_knowledge().keys()
    assert {name.partition("/")[0] for name in known[1]} == {knowledge_name(STRATEGIES["ewc"])}


def test_code_other_than_what_sent_it_is_refused(informed, store):
    job = RunJob(make_params(), FINETUNE, lambda: informed, None, code="other")
    with pytest.raises(InputError, match="is not what the run was sent by"):
        job.perform(store, CPU)
    with pytest.raises(InputError, match="is not what the run was sent by"):
        job.perform_apart(CPU)


@dataclass(frozen=True)
class Recorded:
    """Writes down that it began; the first ``kills`` times its worker is killed there."""

    name: str
    folder: Path
    kills: int = 0
    by: int = signal.SIGKILL

    def perform(self, store: RunStore, device: torch.device) -> dict[str, Any]:
        begun = self.folder / self.name
        with begun.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(begun.read_text().split()) <= self.kills:
            os.kill(os.getpid(), self.by)
            stop_if_requested()
        return {"name": self.name, "device": str(device), "root": store.root}


def test_serial_takes_one_after_the_other(tmp_path):
    jobs = [Recorded(name, tmp_path) for name in "abc"]
    done = list(Serial(RunStore(tmp_path), CPU).map(jobs))
    assert [(place, record["name"]) for place, record in done] == [(0, "a"), (1, "b"), (2, "c")]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_replaced(tmp_path, capfd, by):
    """Its job begins again, and no other job does."""
    jobs = [Recorded(name, tmp_path, int(name == "b"), by) for name in "abcd"]
    done = dict(Processes(tmp_path, [CPU, CPU], 1).map(jobs))
    assert [done[place]["name"] for place in range(4)] == [*"abcd"]
    assert {record["root"] for record in done.values()} == {tmp_path}
    begun = {name: (tmp_path / name).read_text().split() for name in "abcd"}
    assert {name: len(processes) for name, processes in begun.items()} == {
        "a": 1,
        "b": 2,
        "c": 1,
        "d": 1,
    }
    assert os.getpid() not in {int(process) for group in begun.values() for process in group}
    told = capfd.readouterr().err
    assert told.count("b: its worker was killed; another one goes on with it") == 1


def test_a_worker_killed_again_and_again_ends_the_stage(tmp_path):
    jobs = [Recorded("a", tmp_path), Recorded("b", tmp_path, kills=9)]
    with pytest.raises(InputError, match=r"sweep.workers: that of b was killed 2 times"):
        list(Processes(tmp_path, [CPU, CPU], 1).map(jobs))


class KillsTheIdle(Recorded):
    """Kills the worker of the job ``a`` when it has nothing more to do, and then its own."""

    def perform(self, store: RunStore, device: torch.device) -> dict[str, Any]:
        other = self.folder / "a"
        if not (self.folder / self.name).exists():
            wait_for(other.exists, 60, "the other job")
            time.sleep(1)
            os.kill(int(other.read_text()), signal.SIGKILL)
            time.sleep(1)
        return super().perform(store, device)


def test_a_worker_killed_while_it_has_nothing_to_do_is_replaced(tmp_path):
    jobs = [Recorded("a", tmp_path), KillsTheIdle("b", tmp_path, kills=1)]
    done = dict(Processes(tmp_path, [CPU, CPU], 1).map(jobs))
    assert [done[place]["name"] for place in range(2)] == ["a", "b"]
    assert len((tmp_path / "b").read_text().split()) == 2


class Unreadable(Exception):
    """Can be pickled, but not read again."""

    def __init__(self, layer, filters):
        super().__init__(f"{layer} has {filters} filters")


@dataclass(frozen=True)
class Raises:
    name: str = "c"

    def perform(self, store: RunStore, device: torch.device) -> dict[str, Any]:
        raise Unreadable("features.0", 3)


def test_an_error_that_cannot_be_read_here_is_not_told_as_a_kill(tmp_path, capfd):
    with pytest.raises(BrokenProcessPool) as caught:
        list(Processes(tmp_path, [CPU], 1).map([Raises()]))
    assert "Unreadable.__init__() missing 1 required positional argument" in str(
        caught.value.__cause__
    )
    assert "killed" not in capfd.readouterr().err


def test_what_a_job_raises_is_raised_here(tmp_path, informed):
    job = RunJob(make_params(), FINETUNE, partial(dict), None, code="other")
    with pytest.raises(InputError, match="is not what the run was sent by"):
        list(Processes(tmp_path, [CPU, CPU], 1).map([job, job]))
