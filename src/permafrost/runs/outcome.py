"""What a run ends with: raw facts and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from permafrost.strategies.learner import Progress

OnEpoch = Callable[[Progress], None]


@dataclass(frozen=True)
class Outcome:
    """What a training ends with.

    Attributes
    ----------
    facts : dict
        What was measured, as JSON holds it; nothing that follows from it.
    weights : dict of str to Tensor
        Of the network.
    seconds : float
        How long the epochs took, through all interruptions.
    kept : dict of str to Tensor
        What else is kept.
    about : dict
        A :class:`Description` of the network, as JSON holds it: it is stored with the weights.
    """

    facts: dict[str, Any]
    weights: dict[str, Tensor]
    seconds: float
    kept: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def on_cpu(self) -> Outcome:
        """Return it with its tensors on the CPU, to be sent where there may be no such device."""
        weights, kept = (
            {name: value.cpu() for name, value in tensors.items()}
            for tensors in (self.weights, self.kept)
        )
        return replace(self, weights=weights, kept=kept)


def accuracy_facts(progress: Progress) -> dict[str, Any]:
    """Return the accuracy matrix by class as counts of images, and the curves.

    ``R`` has a row for each number of tasks learned, None where there is none, of entries for each
    task: None, or ``correct`` and ``count``, a number for each class.
    """
    return {"R": [row_facts(row) for row in progress.rows], "history": progress.history}


def row_facts(row: Any) -> Any:
    """Return a row of accuracies as JSON holds it."""
    if row is None:
        return None
    return [None if e is None else {"correct": [*e.correct], "count": [*e.count]} for e in row]
