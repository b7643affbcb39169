"""Criteria: what scores the filters of every layer.

A criterion is one of three kinds. A map metric, built in or a user's ``module:function``, compares
the maps of filters and classes. A control looks at the weights alone; to add one, write a function
of :class:`Evidence` and enter it in ``CONTROLS``. A response criterion looks at how the filters
respond to images: :func:`permafrost.ranking.responses.filter_responses` computes it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from permafrost.errors import InputError, NotFiniteError
from permafrost.explain import conv_layers
from permafrost.models.scopes import measuring
from permafrost.models.units import trace_flow
from permafrost.ranking.metrics import METRICS, _imported, evaluate_metric, get_metric
from permafrost.ranking.responses import RESPONSES


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
    gammas : Mapping[str, Tensor]
        γ (F,) of the norm behind each of the layers that has one; only ``bn_gamma`` needs it.
    class_scores : Mapping[str, Mapping[str, Tensor]]
        Scores (F, C) of the same layers' filters, for each response criterion that is asked for.
    """

    weights: Mapping[str, Tensor]
    filter_maps: Mapping[str, Tensor] = field(default_factory=dict)
    class_maps: Tensor | None = None
    seed: int = 0
    gammas: Mapping[str, Tensor] = field(default_factory=dict)
    class_scores: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def network_evidence(model: nn.Module, seed: int) -> Evidence:
    """Return the evidence that lies in a network's weights: all that the controls need.

    Parameters
    ----------
    model : nn.Module
        Any network.
    seed : int
        Not negative; the seed of criteria that draw numbers.

    Returns
    -------
    evidence : Evidence
        Weights as the network computes with them (weight and spectral normalisation, pruning and
        parametrizations included) and, where a norm takes a convolution's output, its γ; on the
        CPU. What does not run in eval mode, such as GoogLeNet's auxiliary heads, is left out. A
        network that runs on no black images has all its weights here, but no γ.

    Raises
    ------
    NotFiniteError
        If a weight or a statistic of the network is not finite; names it. No criterion ranks such
        a network, not even those that do not look at that number.
    """
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise NotFiniteError(f"the network's {name} is not finite")
    layers = conv_layers(model)
    try:
        flow = trace_flow(model)
    except ValueError:
        norms: dict[str, nn.Module] = {}
    else:
        layers = {name: layer for name, layer in layers.items() if name in flow.runs}
        norms = {conv: model.get_submodule(names[0]) for conv, names in flow.norms.items() if names}
    with measuring(model):
        weights = {name: _current_weight(layer) for name, layer in layers.items()}
    return Evidence(
        weights=weights,
        gammas={
            conv: norm.weight.detach().cpu()
            for conv, norm in norms.items()
            if isinstance(norm.weight, Tensor)
        },
        seed=seed,
    )


@torch.no_grad()
def _current_weight(layer: nn.Conv2d) -> Tensor:
    """Return the weight that the layer's next pass would compute with, on the CPU."""
    before = vars(layer).copy()
    hooks: list[Any] = list(layer._forward_pre_hooks.values())
    for hook in hooks:
        # These derive the weight before each pass, so that it may be out of date between passes.
        if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
            hook(layer, ())
    weight = layer.weight.detach().cpu()
    vars(layer).update(before)
    return weight


def combine_classes(evidence: Evidence) -> Evidence:
    """Let one map and one score stand for all classes, which count alike.

    Parameters
    ----------
    evidence : Evidence
        Its class maps and class scores are combined, the rest is passed on.

    Returns
    -------
    evidence : Evidence
        Its class map (1, H, W) is the mean of the class maps, rescaled to 0..1; a constant mean
        becomes zeros. Its class scores (F, 1) are the means over the classes.
    """
    maps = evidence.class_maps
    scores = {
        criterion: {
            layer: values.double().mean(dim=1, keepdim=True).to(values.dtype)
            for layer, values in layers.items()
        }
        for criterion, layers in evidence.class_scores.items()
    }
    return replace(
        evidence, class_maps=None if maps is None else _mean_map(maps), class_scores=scores
    )


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
        layer: torch.rand(
            len(weight), 1, generator=_generator(evidence.seed, position), dtype=torch.float32
        )
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


def bn_gamma_scores(evidence: Evidence) -> dict[str, Tensor]:
    """Score every filter by abs(γ) of the BatchNorm behind it (Liu et al. 2017).

    Parameters
    ----------
    evidence : Evidence
        Its weights (for the layers' names) and gammas are used.

    Returns
    -------
    scores : dict[str, Tensor (F, 1)]
        float32, 0 or more.

    Raises
    ------
    InputError
        If a layer has no BatchNorm, or one without γ.

    References
    ----------
    Liu, Li, Shen, Huang, Yan & Zhang, "Learning efficient convolutional networks through network
    slimming", ICCV 2017. They train with a penalty on γ, which is left out here.
    """
    for layer in evidence.weights:
        if layer not in evidence.gammas:
            raise InputError(
                f"criterion 'bn_gamma' needs a BatchNorm directly behind every convolution, "
                f"but layer {layer} has none that data flow shows: choose another criterion or a "
                "network with BatchNorm"
            )
    return {layer: evidence.gammas[layer].float().abs()[:, None] for layer in evidence.weights}


CONTROLS: dict[str, Criterion] = {
    "random": random_scores,
    "magnitude": magnitude_scores,
    "bn_gamma": bn_gamma_scores,
}


def known_criteria() -> tuple[str, ...]:
    """Return the built-in criteria: the map metrics, the controls, the response criteria."""
    return (*METRICS, *CONTROLS, *RESPONSES)


def needs_maps(criterion: str) -> bool:
    """Tell whether a criterion is a map metric, built in or a user's own."""
    return criterion not in CONTROLS and criterion not in RESPONSES


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
    if not needs_maps(name):
        return
    if name not in METRICS and ":" not in name:
        known = ", ".join(known_criteria())
        raise InputError(f"criterion '{name}' is unknown: use one of {known}, or module:function")
    get_metric(name)


def own_code(name: str) -> list[str] | None:
    """Return hashes of the code of a user's own metric, with all of its package.

    Parameters
    ----------
    name : str
        As for :func:`check_criterion`.

    Returns
    -------
    digests : list of str
        Of each of the package's folders, as they were when the metric was first imported; None for
        one of :func:`known_criteria`.

    Raises
    ------
    InputError
        As by :func:`check_criterion`.
    """
    check_criterion(name)
    if name in known_criteria():
        return None
    _, digests = _imported(name.partition(":")[0])
    return digests


def score_filters(criterion: str, evidence: Evidence) -> dict[str, Tensor]:
    """Score the filters of every layer; higher is better whatever the criterion.

    Parameters
    ----------
    criterion : str
        One of :func:`known_criteria`, or ``module:function`` for a user's own map metric.
    evidence : Evidence
        Weights (and gammas) for the controls; weights, filter maps and class maps for the map
        metrics; weights and class scores for the response criteria.

    Returns
    -------
    scores : dict[str, Tensor (F, C)]
        Keys in the order of the weights. A metric of which lower values are better is negated.
        Controls know no classes and give (F, 1).

    Raises
    ------
    InputError
        If the criterion is unknown, a user's metric gives unusable scores, or the network lacks
        what the criterion looks at.
    ValueError
        If maps or class scores that the criterion needs are missing or do not fit, or maps are
        not finite.
    """
    check_criterion(criterion)
    if criterion in CONTROLS:
        return CONTROLS[criterion](evidence)
    if criterion in RESPONSES:
        return _class_scores(criterion, evidence)
    return _map_scores(criterion, evidence)


def _class_scores(criterion: str, evidence: Evidence) -> dict[str, Tensor]:
    """Return the scores of a response criterion."""
    layers = evidence.class_scores.get(criterion, {})
    for layer, weight in evidence.weights.items():
        if layer not in layers or len(layers[layer]) != len(weight):
            raise ValueError(f"criterion '{criterion}' needs class scores of '{layer}'")
    return {layer: layers[layer] for layer in evidence.weights}


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


def _mean_map(maps: Tensor) -> Tensor:
    """Average maps (C, H, W) and rescale the mean to 0..1: (1, H, W)."""
    mean = maps.double().mean(dim=0, keepdim=True)
    low, high = torch.aminmax(mean)
    return ((mean - low) / torch.where(high > low, high - low, 1)).to(maps.dtype)


def _generator(seed: int, position: int) -> torch.Generator:
    """Return a generator of its own for the layer at this position."""
    # torch's CPU generator keeps 32 bits of its seed, so the pair is hashed to 32 bits, not summed.
    state = np.random.SeedSequence([seed, position]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
