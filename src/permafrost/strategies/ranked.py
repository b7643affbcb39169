"""Which filters to freeze: the first share of a ranking, made anew before each task."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from permafrost.explain import conv_layers
from permafrost.freezing import FilterMasks
from permafrost.ranking.method import ExplainConfig, frozen_masks, rank_network
from permafrost.ranking.weight_scores import permuted
from permafrost.strategies.base import Lesson


@dataclass(frozen=True)
class RankedMasks:
    """Freeze the first share of each layer's filters that are still free.

    Attributes
    ----------
    criterion : str
        What ranks the filters, on the training images of the task learned last.
    pct : float
        Share of the free filters, 0..1, rounded as :func:`count_frozen` does.
    explain : ExplainConfig
        How the network is explained.
    first, first_orders : mapping of str to Tensor, or None
        What is frozen before the second task, or in which order its filters are, if that is known
        already.
    """

    criterion: str
    pct: float
    explain: ExplainConfig
    first: FilterMasks | None = None
    first_orders: Mapping[str, Tensor] | None = None

    def __call__(self, lesson: Lesson, frozen: FilterMasks) -> FilterMasks:
        """Return the masks; those of filters that are frozen already stay set."""
        if self.first is not None and lesson.learned == 1:
            return self.first
        return frozen_masks(self.orders(lesson), self.pct, frozen)

    def orders(self, lesson: Lesson, *, by_chance: bool = False) -> dict[str, Tensor]:
        """Return each layer's filters, the best for the task learned last first."""
        if by_chance:
            return {
                name: permuted(torch.arange(conv.out_channels), lesson.seed, lesson.learned, name)
                for name, conv in conv_layers(lesson.network).items()
            }
        if self.first_orders is not None and lesson.learned == 1:
            return dict(self.first_orders)
        # The task's own logits, which an expanding head has among others.
        own = "multi" if lesson.head == "expanding" else lesson.head
        task = lesson.learned - 1
        return rank_network(
            lesson.network.view(own, task, lesson.learned),
            lesson.batches(task),
            len(lesson.sequence.tasks[task].classes),
            lesson.sequence.normalization,
            self.criterion,
            self.explain,
            lesson.seed,
        )
