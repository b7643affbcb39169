"""Hold single weights fixed, as pruning and packing methods need it; read a network in training."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from permafrost.freezing.holding import Held, Network, Part, Plan, Rows, holding, release
from permafrost.freezing.layers import HeldElements, PartlyFrozen, plan_norm
from permafrost.models.units import is_norm

WeightMasks = Mapping[str, Tensor]


@contextmanager
def frozen_weights(
    model: nn.Module, masks: WeightMasks, *, batch_norms: bool | WeightMasks = False
) -> Iterator[nn.Module]:
    """Keep single weights fixed, bit for bit, inside a ``with`` block.

    An optimizer's momentum, Adam state and weight decay move only a copy that nothing reads. Make
    the optimizer inside the block. On leaving, the layers have their plain parameters again, with
    what was learned. All else is as in :func:`~permafrost.freezing.frozen_filters`.

    Parameters
    ----------
    model : nn.Module
        Any network; it is changed in place.
    masks : mapping of str to Tensor of bool
        For weights and biases of ``Conv2d`` and ``Linear`` layers by name, of the parameter's
        shape; True for each element that must not move. Parameters that are left out all move.
    batch_norms : bool or mapping of str to Tensor of bool, shape (F,)
        Whether every norm, BatchNorm of any kind, keeps γ, β and its running statistics too, and
        normalises by them in training; or which channels of which norms do.

    Yields
    ------
    nn.Module
        The same model.

    Raises
    ------
    ValueError
        If a name is no parameter, a mask has another shape or type than its parameter needs, or
        the parameter belongs to another kind of layer, is derived from others or is tied; in
        inference mode, and of networks in TorchScript or that are not initialised; if a norm
        keeps no statistics or, inside the block, does not normalise by ``batch_norm``.
    """
    network = Network(model)
    layers: dict[nn.Module, dict[str, Rows]] = {}
    for name, mask in masks.items():
        layer, part = _parameter(network, name)
        parameter = layer.get_parameter(part)
        fits = isinstance(mask, Tensor) and mask.dtype == torch.bool
        if not fits or mask.shape != parameter.shape:
            raise ValueError(f"the mask of {name!r} must be bool and of the parameter's shape")
        rows = layers.setdefault(layer, {})
        if part in rows:
            raise ValueError(f"{name!r} is a second name of a parameter; give one mask to each")
        rows[part] = HeldElements(parameter, mask)
    plans = [Plan(layer, PartlyFrozen, rows) for layer, rows in layers.items()]
    if isinstance(batch_norms, Mapping):
        plans += [plan_norm(network, network.layers[n], mask) for n, mask in batch_norms.items()]
    elif batch_norms:
        plans += [plan_norm(network, norm) for norm in network.names if is_norm(norm)]
    with holding(plans):
        yield model


def _parameter(network: Network, name: str) -> tuple[nn.Module, str]:
    """Return the layer that has a parameter, and by which name."""
    place, _, part = name.rpartition(".")
    layer = network.layers.get(place)
    if layer is None or not (network.check(layer, part)):
        raise ValueError(f"{name!r} is no parameter of the network")
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise ValueError(f"single weights of a {type(layer).__name__} cannot be frozen")
    return layer, part


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network as it would be after leaving every ``with`` block of this package.

    Parameters
    ----------
    model : nn.Module
        Also one inside ``frozen_filters`` or ``frozen_weights``; it is left as it is.
    """
    # What a hook derives before each pass has a graph, which cannot be copied.
    derived = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    copied = copy.deepcopy(model, {id(v): v.detach().clone() for v in derived})
    for module in list(copied.modules()):
        if isinstance(module, Held):
            release(module)
    return copied


def current_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights by their plain names, also inside ``frozen_filters``.

    Parameters
    ----------
    model : nn.Module
        The network.

    Returns
    -------
    dict of str to Tensor
        As ``named_parameters`` of the plain network; a partly frozen one is put together of its
        frozen and its live rows, and gradients flow to the live rows.
    """
    weights: dict[str, Tensor] = {}
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if isinstance(module, Part):
            continue
        own = module.whole() if isinstance(module, Held) else module._parameters
        for part, value in own.items():
            if value is not None and value not in seen:
                weights[f"{name}.{part}".lstrip(".")] = value
                seen.add(value)
    return weights
