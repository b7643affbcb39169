"""The whole workflow with three tasks: every criterion and every strategy, under each head."""

import json

import pytest

from permafrost.ranking import CONTROLS, RESPONSES
from permafrost.strategies import STRATEGIES
from project import Project

OWN = "custom.centre_distance:centre_distance"
CRITERIA = ["mse", *CONTROLS, *RESPONSES, OWN]
TASKS = 3


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("three") / "permafrost")
    project.change(
        {
            "split": {"tasks": TASKS, "classes_per_task": 3},
            "model": {"head": "multi"},
            "train": {"epochs": 1},
            "rank": {"metrics": CRITERIA},
            "freeze": {"metric": "taylor"},
            "consolidate": {"fisher_images": 20},
            "tune": {"ewc": [{"strength": 1}, {"strength": 10}]},
            "sweep": {
                "strategies": list(STRATEGIES),
                "metrics": CRITERIA,
                "pcts": [0.5],
                "heads": ["shared", "multi"],
            },
        }
    )
    project.run("dvc", "repro")
    return project


def test_every_criterion_and_strategy_learns_three_tasks(project):
    rows = json.loads((project.folder / "metrics/sweep.json").read_text())
    rows = rows["rows"] if isinstance(rows, dict) else rows
    assert {row["status"] for row in rows} == {"done"}
    for head in ("shared", "multi"):
        mine = [row for row in rows if row["head"] == head]
        assert {row["metric"] for row in mine if row["strategy"] == "freeze"} == set(CRITERIA)
        assert {row["strategy"] for row in mine} == set(STRATEGIES)
    for row in rows:
        assert len(row["R"]) == TASKS + 1
        assert all(len(line) == TASKS for line in row["R"])
        assert row["acc_mean"] == pytest.approx(sum(row["R"][-1]) / TASKS)
        assert [row[f"acc_task{task + 1}"] for task in range(TASKS)] == row["R"][-1]


def test_tables_and_trials_know_all_tasks(project):
    tables = (project.folder / "reports/tables.md").read_text()
    assert "| task 1 | task 2 | task 3 | mean | forgetting |" in tables
    assert "what task 1 has lost" not in tables
    assert "earlier tasks" in tables
    tune = json.loads((project.folder / "metrics/tune.json").read_text())
    assert "acc_task3" in json.dumps(tune)
    variant = json.loads((project.folder / "metrics/variant.json").read_text())
    assert "acc_task3" in json.dumps(variant)


def test_a_second_repro_runs_nothing(project):
    assert "Running" not in project.run("dvc", "repro")
