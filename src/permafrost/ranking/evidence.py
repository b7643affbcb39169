"""Evidence: what the filters of a network are scored by."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from permafrost.errors import NotFiniteError
from permafrost.explain import conv_layers
from permafrost.models.scopes import measuring
from permafrost.models.units import trace_flow


@dataclass(frozen=True)
class Evidence:
    """What filters are scored by.

    Attributes
    ----------
    weights : Mapping[str, Tensor]
        Weight (F, I, kH, kW) of every convolution layer, in network order.
    filter_maps : Mapping[str, Tensor]
        Maps (F, H, W) of the same layers' filters; only map metrics need them.
    class_maps : Tensor (C, H, W) or None
        Maps of the classes; only map metrics and ``overlap`` need them.
    seed : int
        Not negative; the seed of criteria that draw numbers.
    gammas : Mapping[str, Tensor]
        γ (F,) of the norm behind each of the layers that has one.
    class_scores : Mapping[str, Mapping[str, Tensor]]
        Scores (F, C) of the same layers' filters, by criteria that look at images:
        :func:`permafrost.ranking.filter_responses` gives them.
    """

    weights: Mapping[str, Tensor]
    filter_maps: Mapping[str, Tensor] = field(default_factory=dict)
    class_maps: Tensor | None = None
    seed: int = 0
    gammas: Mapping[str, Tensor] = field(default_factory=dict)
    class_scores: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def network_evidence(model: nn.Module, seed: int) -> Evidence:
    """Return the evidence that lies in a network's weights: all that weights criteria need.

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


def _mean_map(maps: Tensor) -> Tensor:
    """Average maps (C, H, W) and rescale the mean to 0..1: (1, H, W)."""
    mean = maps.double().mean(dim=0, keepdim=True)
    low, high = torch.aminmax(mean)
    return ((mean - low) / torch.where(high > low, high - low, 1)).to(maps.dtype)
