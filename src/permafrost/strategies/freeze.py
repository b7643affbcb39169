"""Freeze the best-ranked share of every layer's filters (Feenstra & Dow 2023)."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from permafrost.freezing import BatchNormFreeze, frozen_filters
from permafrost.models import TaskNetwork
from permafrost.strategies.base import MaskSource, Strategy


@dataclass(frozen=True)
class Freeze(Strategy):
    """Train the next task with some filters frozen.

    Before each further task the filters are ranked anew, by the task learned last, and the first
    share of that ranking is frozen; a filter that was frozen before may then move again.

    Attributes
    ----------
    masks : callable
        Given the network and the number of tasks learned, the filters to freeze.
    batch_norm : {"full", "affine", "none"}
        What is frozen of a frozen filter's BatchNorm.
    """

    masks: MaskSource
    batch_norm: BatchNormFreeze = "full"

    name = "freeze"

    def while_learning(
        self, network: TaskNetwork, learned: int
    ) -> AbstractContextManager[nn.Module | None]:
        """Hold the masks' filters frozen."""
        return frozen_filters(network, self.masks(network, learned), self.batch_norm)
