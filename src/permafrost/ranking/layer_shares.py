"""How much of each layer is kept: an equal share, or what an explanation says."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_LARGEST = 1e9
CountNew = Callable[[Mapping[str, int]], int]

SHARES = ("uniform", "explained", "magnitude", "depth")


def uniform_shares(
    sizes: Mapping[str, int], part: float, free: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return the same share of every layer, or of what every layer has free.

    A share of the whole layer might be more than an earlier task has left of it. Parameters and
    result as for :func:`depth_shares`.
    """
    if free is None:
        return dict.fromkeys(sizes, part)
    counts = {name: int(free[name].sum()) for name in sizes}
    share = part * sum(sizes.values()) / max(1, sum(counts.values()))
    return {name: min(1.0, share) * counts[name] / size for name, size in sizes.items()}


def threshold_shares(
    scores: Mapping[str, Tensor], part: float, free: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return the share of each layer that lies above one threshold for all layers.

    Parameters
    ----------
    scores : mapping of str to Tensor
        Of the weights of each layer.
    part : float
        Of all weights so many lie above it, 0..1; fewer, if fewer are free.
    free : mapping of str to Tensor of bool, optional
        Which weights may be chosen; by default all.

    Returns
    -------
    dict of str to float
        0..1, of all of a layer's weights.
    """
    flat = {
        name: values.flatten().masked_fill(~free[name].flatten(), -torch.inf)
        if free is not None
        else values.flatten()
        for name, values in scores.items()
    }
    every = torch.cat(list(flat.values()))
    count = min(round(part * len(every)), int((every > -torch.inf).sum()))
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[every.argsort(descending=True, stable=True)[:count]] = True
    parts = chosen.split([len(values) for values in flat.values()])
    return {name: float(c.double().mean()) for name, c in zip(flat, parts, strict=True)}


def depth_shares(
    sizes: Mapping[str, int], part: float, free: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return whole layers from the input on, the last of them in part.

    Parameters
    ----------
    sizes : mapping of str to int
        How many weights each layer has, in the order in which the layers run.
    part, free
        As for :func:`threshold_shares`: of a layer its free weights are taken.
    """
    left, shares = part * sum(sizes.values()), {}
    for name, size in sizes.items():
        taken = min(left, size if free is None else int(free[name].sum()))
        shares[name] = taken / size
        left -= taken
    return shares


def mixed_shares(
    one: Mapping[str, float], other: Mapping[str, float], mix: float
) -> dict[str, float]:
    """Return shares between two: ``(1 - mix) · one + mix · other``."""
    return {name: (1 - mix) * one[name] + mix * other[name] for name in one}


def circuit_sizes(
    widths: Mapping[str, int],
    shares: Mapping[str, float],
    new_weights: CountNew,
    wanted: float,
) -> dict[str, int]:
    """Return how many filters of each layer a circuit has: max(1, round(F · √(c · share))).

    Parameters
    ----------
    widths : mapping of str to int
        F of each layer.
    shares : mapping of str to float
        0..1.
    new_weights : callable
        Given the sizes, how many weights the circuit takes that none before it holds; it grows with
        the sizes.
    wanted : float
        How many it should take: c is found by bisection, the largest that takes no more; all
        layers have at least one filter.
    """

    def sizes(factor: float) -> dict[str, int]:
        wanted_by = {n: widths[n] * min(1.0, (factor * shares[n]) ** 0.5) for n in widths}
        return {name: max(1, round(size)) for name, size in wanted_by.items()}

    low, high = 0.0, 1.0
    while new_weights(sizes(high)) <= wanted and high < _LARGEST:
        low, high = high, high * 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if new_weights(sizes(middle)) <= wanted else (low, middle)
    return sizes(low)
