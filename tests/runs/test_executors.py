"""Runs sent to other processes, and to where the project's files are not."""

import os
import pickle
import signal
import subprocess
import sys
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
from permafrost.strategies import STRATEGIES
from small_runs import CPU, EWC, FINETUNE, FREEZE, MASKS, make_params

# As an engine's worker: no project, nothing but the package and what arrives.
ELSEWHERE = """
import pickle, sys
import torch
torch.set_num_threads(1)
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
def test_a_run_sent_by_content_returns_whole(tmp_path, informed, make_store, spec):
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

    def perform(self, store: RunStore, device: torch.device) -> dict[str, Any]:
        begun = self.folder / self.name
        with begun.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(begun.read_text().split()) <= self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"name": self.name, "device": str(device), "root": store.root}


def test_serial_takes_one_after_the_other(tmp_path):
    jobs = [Recorded(name, tmp_path) for name in "abc"]
    done = list(Serial(RunStore(tmp_path), CPU).map(jobs))
    assert [(place, record["name"]) for place, record in done] == [(0, "a"), (1, "b"), (2, "c")]


def test_a_killed_worker_is_replaced(tmp_path, capfd):
    """Its job begins again, and no other job does."""
    jobs = [Recorded(name, tmp_path, kills=int(name == "b")) for name in "abcd"]
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
    assert told.count("b: its worker was killed; another one goes on after the last epoch") == 1


def test_a_worker_killed_again_and_again_ends_the_stage(tmp_path):
    jobs = [Recorded("a", tmp_path), Recorded("b", tmp_path, kills=9)]
    with pytest.raises(InputError, match=r"sweep.workers: that of b was killed 2 times"):
        list(Processes(tmp_path, [CPU, CPU], 1).map(jobs))


def test_what_a_job_raises_is_raised_here(tmp_path, informed):
    job = RunJob(make_params(), FINETUNE, partial(dict), None, code="other")
    with pytest.raises(InputError, match="is not what the run was sent by"):
        list(Processes(tmp_path, [CPU, CPU], 1).map([job, job]))
