"""How many filters of a layer a share is, and which these are; without PyTorch."""

import math
from collections.abc import Collection, Sequence


def count_frozen(pct: float, filters: int) -> int:
    """Count the filters to freeze: pct * filters, rounded to the nearest, half up.

    So a narrow layer may be frozen as a whole (0.5 of one filter) or not at all (0.4 of one) where
    wider layers freeze some filters.

    Parameters
    ----------
    pct : float
        Share of the filters, 0..1.
    filters : int
        Filters of the layer.

    Returns
    -------
    count : int
        0..filters.

    Raises
    ------
    ValueError
        If pct lies outside 0..1.
    """
    if not 0 <= pct <= 1:
        raise ValueError(f"pct is {pct}: must lie in 0..1")
    # 0.145 * 100 is 14.499999999999998 in floating point, and must round as 14.5 does.
    return math.floor(round(pct * filters, 9) + 0.5)


def first_filters(order: Sequence[int], pct: float, before: Collection[int] = ()) -> list[int]:
    """Return the filters that are frozen: the first free ones of an order join those before.

    Parameters
    ----------
    order : sequence of int
        All filters of a layer.
    pct : float
        Share of the free filters to freeze, 0..1, rounded as :func:`count_frozen` does.
    before : collection of int
        The filters that are frozen already and stay so.

    Returns
    -------
    list of int
        In ascending order.

    Raises
    ------
    ValueError
        If pct lies outside 0..1.
    """
    taken = set(before)
    free = [index for index in order if index not in taken]
    return sorted(taken | {*free[: count_frozen(pct, len(free))]})
