"""Selection: from the scores of a layer's filters to the filters that are frozen."""

from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

from permafrost.errors import InputError, NotFiniteError
from permafrost.shares import first_filters

AGGREGATES = ("union", "mean", "max", "combined")


def order_filters(scores: Tensor, aggregate: str = "union", reverse: bool = False) -> Tensor:
    """Order a layer's filters, best first; ties by the lower index.

    Parameters
    ----------
    scores : Tensor (F, C)
        Scores of F filters for C classes (C >= 1); higher is better.
    aggregate : {"union", "mean", "max", "combined"}
        How the classes' orders combine. ``union``: the classes take turns, class 0 first, and each
        adds its best filter that is not yet taken; of one class that is its own order. ``mean`` and
        ``max``: by the mean or maximum of a filter's scores over the classes. ``combined``: the
        scores (F, 1) come from evidence of all classes at once, as
        :func:`permafrost.ranking.combine_classes` makes it.
    reverse : bool
        Worst first: under ``union`` each class adds its worst filter not yet taken, else the
        lowest mean, maximum or score comes first. Ties still go by the lower index, so this is
        not the flipped order.

    Returns
    -------
    order : Tensor (F,)
        int64, a permutation of 0..F-1.

    Raises
    ------
    InputError
        If the aggregate is unknown.
    ValueError
        If the scores are not (F, C) with C >= 1 (C = 1 if ``combined``).
    NotFiniteError
        If a score is not finite.
    """
    if aggregate not in AGGREGATES:
        known = ", ".join(AGGREGATES)
        raise InputError(f"aggregate '{aggregate}' is unknown: use one of {known}")
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, not (F, C) with C >= 1")
    if aggregate == "combined" and scores.shape[1] != 1:
        raise ValueError(f"aggregate 'combined' needs scores (F, 1), not {tuple(scores.shape)}")
    if not torch.isfinite(scores).all():
        raise NotFiniteError("scores are not finite")
    if aggregate == "mean":
        scores = scores.double().mean(dim=1, keepdim=True)
    elif aggregate == "max":
        scores = scores.amax(dim=1, keepdim=True)
    orders = scores.argsort(dim=0, descending=not reverse, stable=True)
    return _take_turns(orders)


def frozen_mask(order: Tensor, pct: float, before: Tensor | None = None) -> Tensor:
    """Mark the first free filters of an order as frozen.

    Parameters
    ----------
    order : Tensor (F,)
        A permutation of 0..F-1, as :func:`order_filters` gives it.
    pct : float
        Share of the free filters to freeze, 0..1, as :func:`permafrost.shares.first_filters`
        takes it.
    before : Tensor (F,), optional
        bool, the filters that are frozen already and stay so; without it all are free.

    Returns
    -------
    mask : Tensor (F,)
        bool, True for the filters that are frozen.

    Raises
    ------
    ValueError
        If pct lies outside 0..1.
    """
    taken = [] if before is None else filters_of(before)
    frozen = torch.tensor(
        first_filters(order.tolist(), pct, taken), dtype=torch.int64, device=order.device
    )
    return mask_of(frozen, len(order))


def mask_of(filters: Tensor | Sequence[int], count: int) -> Tensor:
    """Mark some of a layer's filters.

    Parameters
    ----------
    filters : Tensor (n,) or sequence of int
        Their indices.
    count : int
        F, how many the layer has.

    Returns
    -------
    mask : Tensor (F,)
        bool.
    """
    indices = torch.as_tensor(filters, dtype=torch.int64)
    mask = torch.zeros(count, dtype=torch.bool, device=indices.device)
    mask[indices] = True
    return mask


def filters_of(mask: Tensor) -> list[int]:
    """Return the indices that :func:`mask_of` has marked, in ascending order."""
    indices: list[int] = mask.nonzero().flatten().tolist()
    return indices


def _take_turns(orders: Tensor) -> Tensor:
    """Merge the columns of (F, C): each in turn adds its first filter not yet taken."""
    queues = [iter(column) for column in orders.T.tolist()]
    taken: dict[int, None] = {}
    for queue in cycle(queues):
        if len(taken) == len(orders):
            break
        taken[next(index for index in queue if index not in taken)] = None
    return torch.tensor(list(taken), dtype=torch.int64, device=orders.device)
