"""The row of a table, derived from the matrix of accuracies."""

import pytest

from permafrost.evaluation import Accuracy
from permafrost.runs.outcome import accuracy_facts, row_facts
from permafrost.runs.rows import further_row
from permafrost.strategies import Progress
from small_runs import FILTERS


def test_the_row_is_derived_from_the_matrix():
    matrix = [[0.1, 0.2], [0.9, 0.3], [0.6, 0.8]]
    rows = [[Accuracy((round(10 * v), round(5 * v)), (10, 5)) for v in row] for row in matrix]
    row = further_row(accuracy_facts(Progress(2, rows)) | {"memory_bytes": 7} | FILTERS)
    matrix = [[entry.overall for entry in line] for line in rows]
    assert row["R"] == matrix
    for task in (0, 1):
        name = f"acc_task{task + 1}"
        found = [row[f"{name}_init"], row[f"{name}_before"], row[name]]
        assert found == [line[task] for line in matrix]
    kept, learned = matrix[2]
    assert row["acc_mean"] == pytest.approx((kept + learned) / 2)
    assert row["acc_classes"] == pytest.approx(sum((0.6, 0.6, 0.8, 0.8)) / 4)
    assert row["forgetting"] == -row["bwt"] == pytest.approx(matrix[1][0] - kept)
    assert row["fwt"] == pytest.approx(matrix[1][1] - matrix[0][1])
    assert (row["status"], row["memory_bytes"]) == ("done", 7)
    assert (row["free_filters"], row["free_filters_least"]) == (0.7, 0.5)
    assert row["acc_mean_without_task"] is row["acc_task2_without_task"] is None


def test_the_row_where_the_task_is_not_told():
    rows = [[Accuracy((1, 1), (2, 2))] * 2] * 3
    untold = row_facts([Accuracy((2, 1), (4, 4)), Accuracy((0, 1), (4, 4))])
    facts = accuracy_facts(Progress(2, rows)) | {"memory_bytes": 0, "without_task": untold}
    row = further_row(facts | FILTERS)
    assert row["acc_task1_without_task"] == 3 / 8
    assert row["acc_task2_without_task"] == 1 / 8
    assert row["acc_mean_without_task"] == 1 / 4
