"""A clone of committed results, without DVC's cache: it shows them, and trains all of them anew."""

import copy

import pytest

from project import RESULTS, SEED_STAGES, STAGES, Project, stages_run

EVERY_STAGE = sorted(f"{stage}@0" if stage in SEED_STAGES else stage for stage in STAGES)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a project whose workflow has run, trials too, and whose results are committed."""
    project = Project(tmp_path_factory.mktemp("committed") / "project")
    project.change({"tune": {"freeze": [{"pct": 0.25}, {"pct": 0.5}]}})
    project.commit("with trials")
    assert sorted(stages_run(project.run("dvc", "repro"))) == EVERY_STAGE
    project.commit("results")
    return project


@pytest.fixture(scope="module")
def clone(project: Project) -> Project:
    clone = copy.copy(project)
    clone.folder, clone.seen = project.folder.with_name("clone"), set()
    project.run("git", "clone", "-q", str(project.folder), str(clone.folder))
    return clone


def test_git_gets_the_summaries_and_nothing_else(project: Project) -> None:
    committed = project.run("git", "diff", "--name-only", "HEAD~1", "HEAD").split()
    assert committed == list(RESULTS)
    assert project.run("git", "ls-files", "data", "models", "reports").split() == [
        f"{folder}/README.md" for folder in ("data", "models", "reports")
    ]


def test_a_clone_shows_the_results_before_anything_is_run(project: Project, clone: Project) -> None:
    shown = clone.run("dvc", "metrics", "show", "--json")
    for name in ("acc_task1", "comparison.json", "tune.json", "variant.json"):
        assert name in shown
    assert shown == project.run("dvc", "metrics", "show", "--json")
    assert clone.run("dvc", "metrics", "diff").strip() == ""
    compared = clone.run("dvc", "metrics", "diff", "HEAD~1")
    assert "shared.freeze.mse.25%.acc_mean.mean" in compared
    assert clone.run("python", ".ci/stale.py") == ""


def test_a_clone_trains_all_of_it(project: Project, clone: Project) -> None:
    assert sorted(stages_run(clone.run("dvc", "repro"))) == EVERY_STAGE
    assert clone.cells() == project.cells()
    assert clone.runs() == project.runs() == project.expected_runs()
    assert clone.tags("permafrost-trials", "kind") == {"trial": 2}
    assert clone.run("git", "status", "--porcelain") == ""  # the same machine, the same bits
