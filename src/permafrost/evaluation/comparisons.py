"""Comparisons of two methods on the same seeds: differences, their tests, trade-offs.

SciPy is imported where it is used: stages that compare nothing start without it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_ROUNDING = 1e-9
# Of each seed.
Values = Mapping[int, float]


@dataclass(frozen=True)
class Difference:
    """How far one method is above another, paired by seed.

    Attributes
    ----------
    mean : float
        Of the seeds' differences.
    low, high : float or None
        Its 95% interval by Student's t; None for a single seed.
    effect : float or None
        Cohen's d of paired samples: the mean over the differences' standard deviation. None for a
        single seed, and where all differences are equal.
    p : float or None
        Of the two-sided paired t test; None as ``effect``.
    seeds : int
        How many there are.
    """

    mean: float
    low: float | None
    high: float | None
    effect: float | None
    p: float | None
    seeds: int


def paired_difference(left: Values, right: Values) -> Difference | None:
    """Compare two methods on the seeds that both have.

    Parameters
    ----------
    left, right : mapping of int to float
        By seed.

    Returns
    -------
    Difference or None
        Of left minus right; None if they share no seed.
    """
    values = [left[seed] - right[seed] for seed in left if seed in right]
    if not values:
        return None
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Difference(mean, None, None, None, None, 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    if spread <= _ROUNDING * max(1.0, abs(mean)):  # equal, but for how they are stored
        return Difference(mean, mean, mean, None, None, count)
    from scipy import special

    error = spread / math.sqrt(count)
    half = float(special.stdtrit(count - 1, 0.975)) * error
    p = 2 * float(special.stdtr(count - 1, -abs(mean) / error))
    return Difference(mean, mean - half, mean + half, mean / spread, p, count)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number.

    Holm (1979), "A simple sequentially rejective multiple test procedure": the k-th smallest of n
    is multiplied by n - k + 1, and is no less than those before it. Below 0.05 a claim holds at
    that level among all n together.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, least = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = least
    return adjusted


@dataclass(frozen=True)
class Point:
    """A method at one share of what it keeps.

    Attributes
    ----------
    share : float
        Of the filters, 0..1; 0 is fine-tuning.
    kept, learned : float
        Accuracy on the earlier and on the new task.
    """

    share: float
    kept: float
    learned: float


class TradeOff:
    """What one seed's ranking keeps where it learns as much as another.

    The accuracy on the new task is made monotonous in the share by isotonic regression (it falls as
    more is held); between shares both accuracies are linear in it. Where several shares learn the
    same, what they keep is averaged.

    Parameters
    ----------
    points : sequence of Point
        At least two shares, each once.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        from scipy.optimize import isotonic_regression

        ordered = sorted(points, key=lambda point: point.share)
        if len(ordered) < 2 or any(a.share == b.share for a, b in pairwise(ordered)):
            raise ValueError("a trade-off needs two shares or more, each once")
        fitted = isotonic_regression([p.learned for p in ordered], increasing=False).x
        levels: dict[float, list[float]] = {}
        for point, learned in zip(ordered, map(float, fitted), strict=True):
            levels.setdefault(learned, []).append(point.kept)
        self._levels = [(level, sum(kept) / len(kept)) for level, kept in levels.items()]

    def kept_at(self, learned: float) -> float | None:
        """Return what is kept where so much is learned; None beyond the shares' range."""
        for (more, kept), (less, kept_there) in pairwise(self._levels):
            if less <= learned <= more:
                return kept + (kept_there - kept) * (more - learned) / (more - less)
        only = self._levels[0]
        return only[1] if len(self._levels) == 1 and learned == only[0] else None
