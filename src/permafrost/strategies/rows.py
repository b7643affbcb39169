"""Frozen filters, as many of each layer as an explanation says."""

from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor

from permafrost.strategies.base import (
    FilterRanking,
    Lesson,
    strategy,
)
from permafrost.strategies.freeze import FreezesFilters
from permafrost.strategies.sized import CHANCE, SHARE_TWINS, Sized


@strategy("rows")
@dataclass(frozen=True)
class Rows(Sized, FreezesFilters):
    """Freeze the best-ranked filters, of each layer the share that ``shares`` says.

    As :class:`~permafrost.strategies.freeze.Freeze`, which freezes the same share of every layer.
    Before each further task the first max(1, round(share · filters)) of a layer's filters that are
    still free join the frozen ones; shares are parts of the weights of filters that are free.

    Attributes
    ----------
    ranking : callable
        What ranks the filters.
    """

    ranking: FilterRanking = field(kw_only=True)

    ranks: ClassVar[bool] = True
    twins: ClassVar[tuple[str, ...]] = (CHANCE, *SHARE_TWINS)

    def choose(self, lesson: Lesson) -> dict[str, Tensor]:
        """Return the filters to freeze, and those that are frozen."""
        orders = self.ranking.orders(lesson, by_chance=self.twin == CHANCE)
        frozen = self.frozen(lesson.network, lesson.memory)
        layers, free = dict(lesson.network.named_modules()), {}
        masks = {
            name: frozen.get(name, torch.zeros(len(order), dtype=torch.bool)).clone()
            for name, order in orders.items()
        }
        for name, mask in masks.items():
            weight = cast(Tensor, layers[name].weight)
            free[name] = ~mask.to(weight.device)[:, None, None, None].expand_as(weight)
        for name, share in self.layer_shares(lesson, free).items():
            order = orders[name].cpu()
            still = order[~masks[name][order]]
            masks[name][still[: max(1, round(share * len(order)))]] = True
        return masks
