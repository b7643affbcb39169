"""What follows from a run's raw facts: the one place, used whenever a file is made."""

from typing import Any

from permafrost.evaluation import (
    Accuracy,
    accuracy_name,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
)
from permafrost.strategies.packnet import RETRAIN


def accuracies(facts: dict[str, Any]) -> list[list[Accuracy | None] | None]:
    """Return the rows of the accuracy matrix that a record holds."""
    return [row_accuracies(row) for row in facts["R"]]


def row_accuracies(row: Any) -> list[Accuracy | None] | None:
    """Return a row of accuracies that JSON has held."""
    if row is None:
        return None
    return [None if e is None else Accuracy(tuple(e["correct"]), tuple(e["count"])) for e in row]


def first_task_row(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the accuracies of a first task's training, untrained and trained."""
    before, after = accuracies(facts)
    assert before is not None
    assert after is not None
    assert before[0] is not None
    assert after[0] is not None
    return {"acc_task1_init": before[0].overall, "acc_task1": after[0].overall}


def further_row(facts: dict[str, Any]) -> dict[str, Any]:
    """Return a run's columns of the sweep.

    Parameters
    ----------
    facts : dict
        As :func:`permafrost.runs.further_tasks.learn_further` gives them.

    Returns
    -------
    dict
        ``R``, ``status``, ``acc_mean``, ``acc_classes``, ``forgetting``, ``bwt``, ``fwt``, for
        each task ``acc_task{k}`` at the end, ``…_before`` after task 1, ``…_init`` untrained,
        ``…_without_task`` where it is not told, as ``acc_mean_without_task`` (both None where one
        shared head cannot tell), and ``…_pruned`` where a strategy has pruned what it learned;
        ``drift_…``, ``free_filters``, ``free_filters_least`` and ``memory_bytes``.
        Of a training that diverged ``status`` and ``error``.
    """
    if "error" in facts:
        return {"status": "failed", "error": facts["error"]}
    found = accuracies(facts)
    tasks = len(found[-1] or [])
    rows = [row or [None] * tasks for row in found]
    matrix = [[None if entry is None else entry.overall for entry in row] for row in rows]
    last = [value for entry in rows[-1] if entry for value in entry.per_class]
    derived: dict[str, Any] = {
        "R": matrix,
        "status": "done",
        "acc_mean": average_accuracy(matrix),
        "acc_classes": sum(last) / len(last),
        "forgetting": forgetting(matrix),
        "bwt": backward_transfer(matrix),
        "fwt": forward_transfer(matrix),
    }
    for task in range(tasks):
        name = accuracy_name(task)
        derived[name] = matrix[-1][task]
        derived[f"{name}_before"] = matrix[1][task]
        derived[f"{name}_init"] = matrix[0][task]
    untold = row_accuracies(facts.get("without_task")) or [None] * tasks
    shares = [None if entry is None else entry.overall for entry in untold]
    derived |= {f"{accuracy_name(task)}_without_task": value for task, value in enumerate(shares)}
    derived["acc_mean_without_task"] = average_accuracy([shares])
    for epoch in facts["history"]:
        if epoch["phase"] == RETRAIN:  # R[t][t] is from before pruning; the last epoch counts
            pruned = accuracy_name(epoch["task"] - 2)
            derived[f"{pruned}_pruned"] = epoch[pruned]
    drift = facts.get("mean_drift", {})
    derived |= {f"drift_{part}": value for part, value in drift.items()}
    return derived | free_filters(facts) | {"memory_bytes": facts["memory_bytes"]}


def free_filters(facts: dict[str, Any]) -> dict[str, float]:
    """Return the share of the filters that are still free, of all and of the fullest layer."""
    filters, frozen = facts["filters"], facts["frozen"]
    free = {name: count - frozen.get(name, 0) for name, count in filters.items()}
    return {
        "free_filters": sum(free.values()) / sum(filters.values()),
        "free_filters_least": min(free[name] / count for name, count in filters.items()),
    }
