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
        Bounds by Student's t distribution; None for a single value.
    """

    mean: float
    low: float | None
    high: float | None


def confidence_interval(values: Sequence[float]) -> Interval:
    """Return the mean over seeds and its two-sided 95% interval, mean ± t_{0.975,n-1} s/√n.

    Parameters
    ----------
    values : sequence of float
        One for each seed; at least one.

    Raises
    ------
    ValueError
        If there is no value.
    """
    if not values:
        raise ValueError("no values")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None, None)
    from scipy import stats

    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
