"""Hold single weights fixed, as pruning and packing methods need it; read a network in training."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from permafrost.freezing.layers import HeldLayer, PartlyFrozenBatchNorm2d, PartlyFrozenConv2d

WeightMasks = Mapping[str, Tensor]

StandIn = HeldLayer | PartlyFrozenConv2d | PartlyFrozenBatchNorm2d


@contextmanager
def frozen_weights(
    model: nn.Module, masks: WeightMasks, *, batch_norms: bool = False
) -> Iterator[nn.Module]:
    """Keep single weights fixed, bit for bit, inside a ``with`` block.

    An optimizer's momentum, Adam state and weight decay move only a copy that nothing reads. Make
    the optimizer inside the block, and any part of the model that is used there: one taken before
    still has the plain layers. On leaving, the plain layers return, with what was learned.

    Parameters
    ----------
    model : nn.Module
        Any network; it is changed in place.
    masks : mapping of str to Tensor of bool
        For weights and biases of ``Conv2d`` and ``Linear`` layers by name, of the parameter's
        shape; True for each element that must not move. Parameters that are left out all move.
    batch_norms : bool
        Whether every ``BatchNorm2d`` keeps γ, β and its running statistics too, and normalises by
        them in training.

    Yields
    ------
    nn.Module
        The same model.

    Raises
    ------
    ValueError
        If a name is no parameter, a mask has another shape or type than its parameter needs, or
        the parameter belongs to another kind of layer.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"{name!r} is no parameter of the network")
        parameter = parameters[name]
        if mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise ValueError(f"the mask of {name!r} must be bool and of the parameter's shape")
        layer, _, attribute = name.rpartition(".")
        layers.setdefault(layer, {})[attribute] = mask.to(parameter.device)
    stand_ins: dict[str, StandIn] = {
        name: HeldLayer(model.get_submodule(name), parts) for name, parts in layers.items()
    }
    device = next(model.parameters()).device
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items() if batch_norms else ():
        everything = torch.ones(norm.num_features, dtype=torch.bool, device=device)
        stand_ins[name] = PartlyFrozenBatchNorm2d(norm, everything, statistics=True)
    with standing_in(model, stand_ins):
        yield model


@contextmanager
def standing_in(model: nn.Module, stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
    """Put stand-ins in the places of the layers of these names; on leaving, put the layers back."""
    for name, stand_in in stand_ins.items():
        stand_in.train(model.get_submodule(name).training)
        _replace(model, name, stand_in)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            _put_back(model, name, stand_in)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network as it would be after leaving every ``with`` block of this package.

    Parameters
    ----------
    model : nn.Module
        Also one inside ``frozen_filters`` or ``frozen_weights``; it is left as it is.
    """
    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if isinstance(module, StandIn):
            _put_back(copied, name, module)
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
    stand_ins = []
    for name, module in model.named_modules():
        if isinstance(module, StandIn):
            stand_ins.append(f"{name}.")
            parts = {"weight": module.weight_rows, "bias": module.bias_rows}
            weights |= {f"{name}.{part}": rows() for part, rows in parts.items() if rows}
    inside = tuple(stand_ins)
    weights |= {n: p for n, p in model.named_parameters() if not n.startswith(inside)}
    return weights


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _put_back(model: nn.Module, name: str, stand_in: StandIn) -> None:
    """Return the plain layer to its place, with what its stand-in has learned."""
    original = stand_in.write_back()
    original.train(stand_in.training)
    _replace(model, name, original)
