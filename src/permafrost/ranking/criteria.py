"""Criteria: what scores the filters of every layer.

A criterion is a map metric (built in or a user's ``module:function``) or a control that ranks
without maps. To add one, write a function of :class:`Evidence` and enter it in ``CONTROLS``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from permafrost.errors import InputError
from permafrost.ranking.metrics import METRICS, evaluate_metric, get_metric


@dataclass(frozen=True)
class Evidence:
    """All that a criterion may look at.

    Attributes
    ----------
    weights : Mapping[str, Tensor]
        Weight (F, I, kH, kW) of every convolution layer, in network order.
    filter_maps : Mapping[str, Tensor]
        Maps (F, H, W) of the same layers' filters; only map metrics need them.
    class_maps : Tensor (C, H, W) or None
        Maps of the classes; only map metrics need them.
    seed : int
        Not negative; the seed of criteria that draw numbers.
    """

    weights: Mapping[str, Tensor]
    filter_maps: Mapping[str, Tensor] = field(default_factory=dict)
    class_maps: Tensor | None = None
    seed: int = 0


Criterion = Callable[[Evidence], dict[str, Tensor]]


def random_scores(evidence: Evidence) -> dict[str, Tensor]:
    """Draw every filter's score uniformly from 0..1.

    The generator is seeded by the seed and the layer's position, so a layer's scores depend on no
    other layer.

    Parameters
    ----------
    evidence : Evidence
        Its weights and seed are used.

    Returns
    -------
    scores : dict[str, Tensor (F, 1)]
        float32, on the CPU whatever the device of the weights.

    Raises
    ------
    ValueError
        If the seed is negative.
    """
    return {
        layer: torch.rand(len(weight), 1, generator=_generator(evidence.seed, position))
        for position, (layer, weight) in enumerate(evidence.weights.items())
    }


def magnitude_scores(evidence: Evidence) -> dict[str, Tensor]:
    """Score every filter by the mean absolute value of its weights (Li et al. 2017).

    Parameters
    ----------
    evidence : Evidence
        Its weights are used.

    Returns
    -------
    scores : dict[str, Tensor (F, 1)]
        float32, 0 or more.

    References
    ----------
    Li, Kadav, Durdanovic, Samet & Graf, "Pruning filters for efficient ConvNets", ICLR 2017; its
    sum over the weights orders the filters of a layer as their mean does.
    """
    return {
        layer: weight.detach().float().flatten(1).abs().mean(dim=1, keepdim=True)
        for layer, weight in evidence.weights.items()
    }


CONTROLS: dict[str, Criterion] = {"random": random_scores, "magnitude": magnitude_scores}


def known_criteria() -> tuple[str, ...]:
    """Return the names of the built-in criteria: the map metrics, then the controls."""
    return (*METRICS, *CONTROLS)


def check_criterion(name: str) -> None:
    """Check that a criterion can be used; a user's ``module:function`` is imported for that.

    Parameters
    ----------
    name : str
        One of :func:`known_criteria`, or ``module:function``.

    Raises
    ------
    InputError
        If the name is unknown or the user's metric cannot be used.
    """
    if name in CONTROLS:
        return
    if name not in METRICS and ":" not in name:
        known = ", ".join(known_criteria())
        raise InputError(f"criterion '{name}' is unknown: use one of {known}, or module:function")
    get_metric(name)


def score_filters(criterion: str, evidence: Evidence) -> dict[str, Tensor]:
    """Score the filters of every layer; higher is better whatever the criterion.

    Parameters
    ----------
    criterion : str
        One of :func:`known_criteria`, or ``module:function`` for a user's own map metric.
    evidence : Evidence
        Weights for the controls; weights, filter maps and class maps for the map metrics.

    Returns
    -------
    scores : dict[str, Tensor (F, C)]
        Keys in the order of the weights. A metric of which lower values are better is negated.
        Controls that know no classes give (F, 1).

    Raises
    ------
    InputError
        If the criterion is unknown or a user's metric gives unusable scores.
    ValueError
        If a map metric is asked for and maps are missing, do not fit or are not finite.
    """
    check_criterion(criterion)
    if criterion in CONTROLS:
        return CONTROLS[criterion](evidence)
    return _map_scores(criterion, evidence)


def _map_scores(name: str, evidence: Evidence) -> dict[str, Tensor]:
    """Score the filters by a map metric, turned so that higher is better."""
    metric = get_metric(name)
    class_maps = evidence.class_maps
    if class_maps is None:
        raise ValueError(f"criterion '{name}' needs class maps")
    scores = {}
    for layer, weight in evidence.weights.items():
        maps = evidence.filter_maps.get(layer)
        if maps is None or len(maps) != len(weight):
            raise ValueError(f"criterion '{name}' needs {len(weight)} filter maps of '{layer}'")
        values = evaluate_metric(metric, maps, class_maps)
        scores[layer] = values if metric.higher_is_better else -values
    return scores


def _generator(seed: int, position: int) -> torch.Generator:
    """Return a generator of its own for the layer at this position."""
    # torch's CPU generator keeps 32 bits of its seed, so the pair is hashed to 32 bits, not summed.
    state = np.random.SeedSequence([seed, position]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
