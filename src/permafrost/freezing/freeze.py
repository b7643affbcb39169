"""Freeze filters of a network while it is trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from permafrost.freezing.layers import (
    BATCH_NORM_FREEZES,
    BatchNormFreeze,
    PartlyFrozenBatchNorm2d,
    PartlyFrozenConv2d,
)
from permafrost.freezing.weights import StandIn, standing_in
from permafrost.models.units import trace_flow

FilterMasks = Mapping[str, Tensor]


def batch_norm_after(model: nn.Module, images: Tensor | None = None) -> dict[str, str]:
    """Name the norm that follows each convolution: the one whose input is its output.

    Parameters
    ----------
    model, images
        As for :func:`permafrost.models.units.trace_flow`.

    Returns
    -------
    dict of str to str
        Convolution name to norm name, in the order in which the convolutions run; without those
        that no norm follows.

    Raises
    ------
    ValueError
        If no images are given and the network runs on none that were tried.
    """
    flow = trace_flow(model, images)
    return {conv: norms[0] for conv, norms in flow.norms.items() if norms}


@contextmanager
def frozen_filters(
    model: nn.Module, masks: FilterMasks, batch_norm: BatchNormFreeze = "full"
) -> Iterator[nn.Module]:
    """Keep filters frozen, bit for bit, inside a ``with`` block.

    Make the optimizer inside the block: there ``model.parameters()`` holds the live rows only. On
    leaving, the plain layers return, with what was learned. A layer whose filters are all frozen
    has no parameters inside the block; gradients pass through it to the layers below.

    Parameters
    ----------
    model : nn.Module
        Any network; it is changed in place.
    masks : mapping of str to Tensor of bool, shape (F,)
        For each convolution layer by name, True for each frozen filter. A layer that is left out
        or has no frozen filter stays plain.
    batch_norm : {"full", "affine", "none"}
        What is frozen of the BatchNorm behind a frozen filter: ``full``: γ, β and the running
        statistics, by which the channel is then normalised in training too. ``affine``: γ and β.
        ``none``: nothing.

    Yields
    ------
    nn.Module
        The same model.

    Raises
    ------
    ValueError
        If a name is no convolution, a mask has the wrong shape or type, or ``batch_norm`` is
        unknown.
    """
    with standing_in(model, _make_stand_ins(model, masks, batch_norm)):
        yield model


def _make_stand_ins(
    model: nn.Module, masks: FilterMasks, batch_norm: BatchNormFreeze
) -> dict[str, StandIn]:
    norms = batch_norm_after(model)
    stand_ins: dict[str, StandIn] = {}
    if batch_norm not in BATCH_NORM_FREEZES:
        raise ValueError(f"batch_norm must be one of {BATCH_NORM_FREEZES}, not {batch_norm!r}")
    layers = dict(model.named_modules())
    for name, mask in masks.items():
        conv = layers.get(name)
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"{name!r} is no Conv2d")
        if mask.dtype != torch.bool or mask.shape != (conv.out_channels,):
            raise ValueError(f"the mask of {name!r} must be bool of shape ({conv.out_channels},)")
        if not mask.any():
            continue
        mask = mask.to(conv.weight.device)
        stand_ins[name] = PartlyFrozenConv2d(conv, mask)
        if batch_norm != "none" and name in norms:
            norm = layers[norms[name]]
            assert isinstance(norm, nn.BatchNorm2d)
            stand_ins[norms[name]] = PartlyFrozenBatchNorm2d(
                norm, mask, statistics=batch_norm == "full"
            )
    return stand_ins
