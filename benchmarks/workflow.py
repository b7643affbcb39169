"""What DVC and the command line take when there is nothing to do, and runs beside each other."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.measure import Job

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from project import Project

_MANY = {
    "train": {"epochs": 1},
    "rank": {"metrics": ["mse", "random", "magnitude"]},
    "sweep": {
        "strategies": ["freeze"],
        "metrics": ["mse", "random", "magnitude"],
        "pcts": [round(step / 100, 2) for step in range(1, 101)],
    },
}
# Eight runs; on a GPU of some length, so that they outlast the start of a worker.
_EIGHT = {
    "train": {"epochs": 20},
    "rank": {"metrics": ["random"]},
    "freeze": {"metric": "random"},
    "sweep": {
        "strategies": ["freeze"],
        "metrics": ["random"],
        "pcts": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    },
}
_ON_A_GPU = {
    "train": {"epochs": 60},
    "model": {"width": 0.5},
    "runtime": {"device": "cuda"},
}


@contextmanager
def sweep_jobs(device: torch.device) -> Iterator[list[Job]]:
    """Yield a sweep of eight runs beside each other on one device, against one after the other."""
    on_gpu = device.type == "cuda"
    workers = 8 if on_gpu else len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder) / "eight")
        project.change(_EIGHT)
        if on_gpu:
            project.change(_ON_A_GPU)
        project.run("dvc", "repro", "tune", "freeze@0")

        def sweep(count: int) -> None:
            project.change({"sweep": {"workers": count}})
            # Without a sweep's results of before: all runs are trained.
            project.run("dvc", "repro", "--force", "--single-item", "sweep", PERMAFROST_FRESH="1")

        yield [
            Job(
                f"sweep of 8 runs, {workers} workers against one",
                lambda: sweep(workers),
                lambda: sweep(1),
                units=8,
                their_units=8,
                target="3x on one GPU",
            )
        ]


@contextmanager
def workflow_jobs() -> Iterator[list[Job]]:
    """Yield `dvc repro` with nothing to do, with few runs and with 300, and the command's help."""
    with tempfile.TemporaryDirectory() as folder:
        few, many = (Project(Path(folder) / name) for name in ("few", "many"))
        many.change(_MANY)
        for project in (few, many):
            project.run("dvc", "repro")
        runs = len(many.read("metrics/sweep.json"))
        yield [
            Job("no-op dvc repro", lambda: few.run("dvc", "repro"), target="at most 5 s"),
            Job(
                f"no-op dvc repro, {runs} runs",
                lambda: many.run("dvc", "repro"),
                target="at most 6 s",
            ),
            Job(
                "permafrost --help",
                lambda: few.run("permafrost", "--help"),
                target="at most 1 s",
            ),
        ]
