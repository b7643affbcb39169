"""The whole workflow with tasks of unequal size, which are given by the names of their classes."""

from itertools import product

import pytest

from project import Project

CLASSES = [["3", "1", "4"], ["0", "9", "2", "6", "5"], ["8", "7"]]
HEADS = ["multi", "expanding"]
STRATEGIES = ["finetune", "freeze", "lwf", "replay", "joint"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("unequal") / "permafrost")
    project.change(
        {
            "split": {"classes": CLASSES, "tasks": 99, "selection": "random"},
            "model": {"head": "expanding"},
            "train": {"epochs": 1},
            "rank": {"metrics": ["taylor", "random"]},
            "freeze": {"metric": "taylor"},
            "sweep": {
                "strategies": STRATEGIES,
                "metrics": ["taylor"],
                "pcts": [0.5],
                "heads": HEADS,
            },
        }
    )
    project.run("dvc", "repro")
    return project


def test_every_strategy_learns_them_under_each_head(project):
    rows = project.read("metrics/sweep.json")
    assert {row["status"] for row in rows} == {"done"}
    assert {(r["strategy"], r["head"]) for r in rows} == set(product(STRATEGIES, HEADS))
    for row in rows:
        assert [len(line) for line in row["R"]] == [3] * 4
        assert row["acc_mean"] == pytest.approx(sum(row["R"][-1]) / 3)
        assert 0 <= row["acc_classes"] <= 1
        later = row["R"][1][1:]
        assert (None in later) == (row["head"] == "expanding" or row["strategy"] == "joint")


def test_the_variant_knows_their_classes(project):
    record = project.read("metrics/train_second/0.json")
    rows = record["R"]
    assert [len(entry["count"]) for entry in rows[-1]] == [3, 5, 2]
    assert rows[1][1] is None
    tables = (project.folder / "reports/tables.md").read_text()
    assert "| task 1 | task 2 | task 3 | mean | forgetting |" in tables


def test_check_says_them(project):
    lines = project.run("permafrost", "check").splitlines()
    header = next(number for number, line in enumerate(lines) if line.split()[:1] == ["task"])
    for number, (line, names) in enumerate(zip(lines[header + 1 :], CLASSES, strict=False), 1):
        task, *counts, classes = line.split(maxsplit=4)
        assert (task, classes) == (str(number), ", ".join(names))
        assert all(int(count) > 0 for count in counts)


def test_a_name_that_no_class_has_is_refused(project):
    project.change({"split": {"classes": [["3", "1"], ["0", "x"]]}})
    assert "split.classes: the data set has no class 'x'" in project.run(
        "permafrost", "check", code=2
    )
