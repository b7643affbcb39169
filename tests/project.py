"""A small project for the tests: a copy of this one, in git, with parameters that take seconds."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Self

REPOSITORY = Path(__file__).parent.parent

SEED_STAGES = (
    "split",
    "train_first",
    "saliency",
    "visualize",
    "rank",
    "freeze",
    "consolidate",
    "train_second",
)
STAGES = (*SEED_STAGES, "evaluate", "stability", "tune", "sweep", "report", "page")
# What a workflow writes into git.
RESULTS = ("dvc.lock", "metrics/comparison.json", "metrics/tune.json", "metrics/variant.json")

TINY = {
    "seeds": [0],
    "model": {"arch": "vgg11", "width": 0.05},
    "train": {"epochs": 2},
    "visualize": {"steps": 2},
    "rank": {"metrics": ["mse", "random"]},
    "sweep": {
        "strategies": ["finetune", "freeze"],
        "metrics": ["mse"],
        "pcts": [0.25, 0.5],
        "workers": 2,
    },
    "tune": {"freeze": [{"pct": 0.5}]},
    "runtime": {"threads": 1, "device": "cpu"},
}


def command_of(stage: str) -> list[str]:
    """Return the command of a stage, of the first seed where there are several."""
    return ["permafrost", stage, *(["--seed", "0"] if stage in SEED_STAGES else [])]


# For what DVC itself does: two stages that take no time, and note in `ran` that they ran.
PLAIN_STAGES = """
stages:
  first:
    cmd: cp params.yaml data/first && echo first >> ran
    deps: [README.md]
    params: [train]
    outs: [data/first]
  second:
    cmd: cp data/first data/second && echo second >> ran
    deps: [data/first]
    params: [train, seeds]
    outs: [data/second]
"""


def plain_project(folder: Path) -> "Project":
    """Return a project with plain stages."""
    project = Project(folder)
    (folder / "dvc.yaml").write_text(PLAIN_STAGES)
    project.commit("plain stages")
    return project


class Project:
    """A copy of the project in a folder of its own.

    Parameters
    ----------
    folder : Path
        Is created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[str] = set()  # MLflow keeps the runs of trainings that were deleted
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.split():
            source = REPOSITORY / name
            if source.is_file() and name not in RESULTS:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(source.read_bytes())
        self.change(TINY)
        self.run("git", "init", "-q", "-b", "main")
        self.commit("start")

    def copy(self, folder: Path) -> Self:
        """Return a copy of the project as it is now."""
        shutil.copytree(self.folder, folder, symlinks=True)
        other = object.__new__(type(self))
        other.folder, other.seen = folder, set(self.seen)
        return other

    def commit(self, message: str) -> None:
        """Commit everything."""
        self.run("git", "add", "-A")
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        self.run("git", *identity, "commit", "-q", "-m", message)

    def change(self, sections: dict[str, Any]) -> None:
        """Change values in params.yaml."""
        from ruamel.yaml import YAML

        yaml, path = YAML(), self.folder / "params.yaml"
        values = yaml.load(path)
        for name, section in sections.items():
            if isinstance(section, dict):
                values.setdefault(name, {}).update(section)
            else:
                values[name] = section
        yaml.dump(values, path)

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a shell in which the project's environment is active."""
        ignored = ("MLFLOW_TRACKING_URI", "PERMAFROST_FRESH", "DVC_ROOT")
        environment = {name: value for name, value in os.environ.items() if name not in ignored}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        identity = {"NAME": "Test", "EMAIL": "test@example.org"}
        for name, value in identity.items():
            environment[f"GIT_AUTHOR_{name}"] = environment[f"GIT_COMMITTER_{name}"] = value
        return environment | {"COLUMNS": "200", "DVC_NO_ANALYTICS": "1"}

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command in the project."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def run(self, *command: str, code: int = 0, **variables: str) -> str:
        """Run a command in the project and return what it printed."""
        result = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        output = result.stdout + result.stderr
        assert result.returncode == code, f"{command} exited with {result.returncode}:\n{output}"
        return output

    def read(self, name: str) -> Any:
        """Read a JSON file of the project, without the rows' checksums."""
        value = json.loads((self.folder / name).read_text())
        for row in value if isinstance(value, list) else [value]:
            row.pop("checksum", None)
        return value

    def cells(self) -> set[str]:
        """Return the keys of all trainings that were finished in the project."""
        return {path.parent.name for path in self.folder.glob(".permafrost/cells/*/cell.json")}

    def variants(self) -> set[str]:
        """Return the keys of all variants that were evaluated in the project."""
        folders = self.folder.glob(".permafrost/variants/*/variant.json")
        return {path.parent.name for path in folders}

    def runs(self) -> Counter[tuple[str, str]]:
        """Return how many runs MLflow shows of each key and status; curves apart."""
        query = """
            SELECT tags.value, runs.status FROM runs JOIN tags USING (run_uuid)
            WHERE tags.key = 'key' AND runs.lifecycle_stage = 'active'
            AND tags.value NOT LIKE 'curve-%'
        """
        # A connection of its own each time: MLflow's would outlive a store that a test deletes.
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as store:
            return Counter(store.execute(query).fetchall())

    def statuses(self) -> Counter[str]:
        """Return how many runs MLflow shows of each status."""
        counts: Counter[str] = Counter()
        for (_, status), count in self.runs().items():
            counts[status] += count
        return counts

    def tags(self, experiment: str, tag: str) -> Counter[str]:
        """Return the values of a tag of an experiment's runs, and how many have each."""
        query = """
            SELECT tags.value FROM runs JOIN tags USING (run_uuid) JOIN experiments
            ON runs.experiment_id = experiments.experiment_id
            WHERE experiments.name = ? AND tags.key = ? AND runs.lifecycle_stage = 'active'
        """
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as store:
            return Counter(value for (value,) in store.execute(query, (experiment, tag)))

    def client(self) -> Any:
        """Return an MLflow client of the project's store."""
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow.tracking import MlflowClient

        return MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")

    def expected_runs(self) -> Counter[tuple[str, str]]:
        """Return what MLflow has to show: one finished run for each training and variant."""
        self.seen |= self.cells() | self.variants()
        return Counter({(key, "FINISHED"): 1 for key in self.seen})


def stages_run(output: str) -> list[str]:
    """Return the stages that DVC ran, by what it printed."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until a condition holds; fail if it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.1)
