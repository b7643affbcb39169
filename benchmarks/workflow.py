"""What DVC and the command line take when there is nothing to do: in a copy of the project."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
