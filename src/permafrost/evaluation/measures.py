"""Measures of continual learning, from the accuracy matrix R.

R[t][k] is the test accuracy on task k after learning t tasks: row 0 is the untrained network, row T
the end, columns are tasks 1..T (0-based here). An entry is None where it is not defined.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float | None]]


def average_accuracy(matrix: Matrix) -> float | None:
    """ACC = 1/T Σ_k R[T][k] (Lopez-Paz & Ranzato 2017, eq. 2)."""
    return _mean(matrix[-1])


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT = 1/(T-1) Σ_{k<T} R[T][k] − R[k][k] (Lopez-Paz & Ranzato 2017, eq. 3).

    Negative where old tasks are forgotten.
    """
    last = len(matrix) - 1
    return _mean([_difference(matrix[last][k], matrix[k + 1][k]) for k in range(last - 1)])


def forward_transfer(matrix: Matrix) -> float | None:
    """FWT = 1/(T-1) Σ_{k≥2} R[k-1][k] − R[0][k] (Lopez-Paz & Ranzato 2017, eq. 4).

    R[0] is the untrained network. None for an expanding head, which has no output for a task
    before it is learned.
    """
    return _mean([_difference(matrix[k][k], matrix[0][k]) for k in range(1, len(matrix) - 1)])


def forgetting(matrix: Matrix) -> float | None:
    """F = 1/(T-1) Σ_{k<T} max_{1≤t<T} R[t][k] − R[T][k] (Chaudhry et al. 2018, eq. 3).

    Positive where old tasks are forgotten. The untrained row does not count.
    """
    last = len(matrix) - 1
    losses = []
    for task in range(last - 1):
        known = [matrix[t][task] for t in range(1, last)]
        best = max((value for value in known if value is not None), default=None)
        losses.append(_difference(best, matrix[last][task]))
    return _mean(losses)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% confidence interval.

    Attributes
    ----------
    mean : float
        Of the values.
    low, high : float or None
        Bounds; None for a single value.
    """

    mean: float
    low: float | None
    high: float | None


SHARE = (0.0, 1.0)
DIFFERENCE = (-1.0, 1.0)
_DIFFERENCES = ("forgetting", "bwt", "fwt")


def value_range(name: str) -> tuple[float, float]:
    """Return what a measure may be: 0..1 for accuracies, -1..1 for differences of them."""
    return DIFFERENCE if name in _DIFFERENCES else SHARE


def confidence_interval(values: Sequence[float], bounds: tuple[float, float] = SHARE) -> Interval:
    """Return the mean over seeds and its two-sided 95% interval, within what values may be.

    The logit interval with Student's t: m, the mean as a share of the range, has the interval
    logit⁻¹(logit m ± t_{0.975,n-1} s/√n / (m (1 - m))), where s/√n is its standard error and
    m (1 - m) brings that to the logit scale by the delta method (Korn & Graubard 1998, "Confidence
    intervals for proportions with small expected number of positive counts estimated from survey
    data"; Dean & Pagano 2015 compare it with others). It holds the mean, not the mean's logit, and
    never leaves the range; in the middle of it and for a small s it is Student's own.

    Parameters
    ----------
    values : sequence of float
        One for each seed; at least one.
    bounds : tuple of two floats
        The least and the greatest possible value.

    Returns
    -------
    Interval
        Of one value, without bounds. Of equal values, without width: they show no spread, which
        says little about other seeds where they are few.

    Raises
    ------
    ValueError
        If there is no value, or one out of bounds.
    """
    if not values:
        raise ValueError("no values")
    least, greatest = bounds
    if not all(least <= value <= greatest for value in values):
        raise ValueError(f"values {list(values)}; allowed: {least:g} to {greatest:g}")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None, None)
    width = greatest - least
    share = (mean - least) / width
    if min(values) == max(values) or not 0 < share < 1:
        return Interval(mean, mean, mean)
    from scipy import special

    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    error = math.sqrt(variance / len(values)) / width
    half = float(special.stdtrit(len(values) - 1, 0.975)) * error / (share * (1 - share))
    centre = special.logit(share)
    low, high = (least + width * float(special.expit(centre + h)) for h in (-half, half))
    return Interval(mean, low, high)


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
