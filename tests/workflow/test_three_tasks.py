"""The whole workflow with three tasks: every criterion and every strategy."""

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
            "train": {"epochs": 1},
            "rank": {"metrics": CRITERIA},
            "freeze": {"metric": "taylor"},
            "consolidate": {"fisher_images": 20},
            "tune": {"ewc": [{"strength": 1}, {"strength": 10}]},
            "sweep": {"strategies": list(STRATEGIES), "metrics": CRITERIA, "pcts": [0.5]},
        }
    )
    project.run("dvc", "repro")
    return project


def test_every_criterion_and_strategy_learns_three_tasks(project):
    rows = project.read("metrics/sweep.json")
    assert {row["status"] for row in rows} == {"done"}
    assert {row["strategy"] for row in rows} == set(STRATEGIES)
    assert {row["metric"] for row in rows if row["strategy"] == "freeze"} == set(CRITERIA)
    for row in rows:
        assert [len(line) for line in row["R"]] == [TASKS] * (TASKS + 1)
        assert row["acc_mean"] == pytest.approx(sum(row["R"][-1]) / TASKS)
        assert [row[f"acc_task{task + 1}"] for task in range(TASKS)] == row["R"][-1]


def test_what_is_shown_knows_every_task(project):
    tables = (project.folder / "reports/tables.md").read_text()
    assert "| task 1 | task 2 | task 3 | mean | forgetting |" in tables
    trials = project.read("metrics/tune.json")["heads"]["shared"]["ewc"]["trials"]
    assert all(0 <= trial["acc_task3"] <= 1 for trial in trials)
    assert 0 <= project.read("metrics/variant.json")["acc_task3"]["mean"] <= 1
    curves = project.read("reports/plots/variant_epochs.json")
    assert [(row["epoch"], row["task"]) for row in curves] == [
        (epoch, task) for epoch in (1, 2) for task in "123"
    ]
