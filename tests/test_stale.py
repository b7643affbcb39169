"""What CI says of a dvc.lock that is stale: of a clone, which has no results but the summaries."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from project import Project

STAGES = """
stages:
  first:
    matrix:
      seed: ${seeds}
    cmd: mkdir -p data/tasks && cp code/first data/tasks/${item.seed}
    deps: [code]
    outs: ['data/tasks/${item.seed}']
  second:
    cmd: cp data/tasks/0 metrics/sweep.json && cp data/tasks/0 metrics/variant.json
    deps: [data/tasks, CITATION.cff]
    params: [train.lr]
    outs: [metrics/sweep.json]
    metrics:
      - metrics/variant.json:
          cache: false
"""
REMEDY = "run `make repro`, then commit dvc.lock, images.yaml and metrics/\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a project of two stages whose results are in git, as far as they belong there."""
    project = Project(tmp_path_factory.mktemp("stale") / "project")
    (project.folder / "dvc.yaml").write_text(STAGES)
    (project.folder / "code").mkdir()
    (project.folder / "code/first").write_text('{"acc": 0.5}')
    project.commit("plain stages")
    project.run("dvc", "repro")
    project.commit("results")
    return project


@pytest.fixture
def clone(project: Project, tmp_path: Path) -> Project:
    clone = copy.copy(project)
    clone.folder = tmp_path / "clone"
    project.run("git", "clone", "-q", str(project.folder), str(clone.folder))
    return clone


def stale(project: Project, *lines: str) -> None:
    """Check what is told, but for the last line."""
    output = project.run("python", ".ci/stale.py", code=1 if lines else 0)
    last = (f"dvc.lock is stale; {REMEDY}",) if lines else ()
    assert output.splitlines(keepends=True) == [*(f"{line}\n" for line in lines), *last]


def replace(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def test_results_that_are_absent_are_not_stale(project: Project, clone: Project) -> None:
    assert not (clone.folder / "data/tasks").exists()
    stale(clone)
    stale(project)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replace("code/first", "0.5", "0.6"), "first@0: code modified"),
        (
            replace("params.yaml", "lr: 0.001", "lr: 0.002"),
            "second: params.yaml: train.lr modified",
        ),
        (replace("dvc.yaml", "&& cp data/", "&& cp -f data/"), "second: changed command"),
        (replace("metrics/variant.json", "0.5", "0.6"), "second: metrics/variant.json modified"),
        (
            lambda folder: (folder / "metrics/variant.json").unlink(),
            "second: metrics/variant.json deleted",
        ),
        (lambda folder: (folder / "CITATION.cff").unlink(), "second: CITATION.cff deleted"),
    ],
    ids=["code", "parameter", "command", "summary", "no summary", "no code"],
)
def test_what_is_stale_is_told(clone: Project, change: Callable[[Path], object], told: str) -> None:
    change(clone.folder)
    stale(clone, told)


def test_a_stage_that_was_never_run(clone: Project) -> None:
    clone.change({"seeds": [0, 1]})
    stale(clone, "first@1: code modified")


def test_without_a_lock(clone: Project) -> None:
    (clone.folder / "dvc.lock").unlink()
    assert clone.run("python", ".ci/stale.py", code=1) == f"dvc.lock: not found; {REMEDY}"
