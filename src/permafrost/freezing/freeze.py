"""Freeze filters of a network while it is trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from permafrost.freezing.holding import Network, holding
from permafrost.freezing.layers import BATCH_NORM_FREEZES, BatchNormFreeze, plan_conv, plan_norm
from permafrost.models.units import is_norm, trace_flow

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
    model: nn.Module,
    masks: FilterMasks,
    batch_norm: BatchNormFreeze = "full",
    *,
    images: Tensor | None = None,
) -> Iterator[nn.Module]:
    """Keep filters frozen, bit for bit, inside a ``with`` block.

    Make the optimizer inside the block: there ``model.parameters()`` holds the live rows only, and
    on a GPU whole copies of which the frozen rows are read by nothing. On leaving, the layers have
    their whole parameters again, with what was learned. A layer whose filters are all frozen has no
    parameters inside the block; gradients pass through it to the layers below. Parameters that do
    not require a gradient do not inside either.

    All layers stay the objects that they are; ``layer.weight`` is newly put together whenever it
    is read, so that writing into it changes nothing. ``state_dict`` and ``load_state_dict`` have
    the plain network's names and tensors; what is loaded replaces frozen rows too. A copy or a
    pickle of the model is held like it: :func:`plain_copy` makes a plain network of either.

    Parameters
    ----------
    model : nn.Module
        Any network; it is changed in place.
    masks : mapping of str to Tensor of bool, shape (F,)
        For each convolution layer by name, True for each frozen filter. A layer that is left out
        or has no frozen filter stays plain.
    batch_norm : {"full", "affine", "none"}
        What is frozen of the norms behind a frozen filter, BatchNorm of any kind: ``full``: γ, β
        and the running statistics, by which the channel is then normalised in training too.
        ``affine``: γ and β. ``none``: nothing. A channel of a norm behind several convolutions is
        frozen if one of their filters is.
    images : Tensor, shape (N, C, H, W), optional
        The network is run on them once, in eval mode, to see which norm is behind which
        convolution; without them on black images of usual sizes.

    Yields
    ------
    nn.Module
        The same model.

    Raises
    ------
    ValueError
        If a name is no convolution, a mask has the wrong shape or type, or ``batch_norm`` is
        unknown; in inference mode, and of networks in TorchScript or that are not initialised; if
        a frozen filter could move: its weight is derived (weight normalisation, pruning) or tied
        to another layer's, its layer or norm has further parameters of its own, or its norm
        keeps no statistics or, inside the block, does not normalise by ``batch_norm``; if the
        network runs on no images that were tried, or a masked convolution does not run.
    """
    if batch_norm not in BATCH_NORM_FREEZES:
        raise ValueError(f"batch_norm must be one of {BATCH_NORM_FREEZES}, not {batch_norm!r}")
    network = Network(model)
    convs = _masked(network, masks)
    plans = [plan_conv(network, conv, mask) for conv, mask in convs.items()]
    if batch_norm != "none" and convs and any(is_norm(layer) for layer in network.names):
        norms = _norms_behind(model, network, convs, images)
        full = batch_norm == "full"
        plans += [plan_norm(network, norm, m, statistics=full) for norm, m in norms.items()]
    with holding(plans):
        yield model


def _masked(network: Network, masks: FilterMasks) -> dict[nn.Conv2d, Tensor]:
    """Return the layers that have a frozen filter, with their masks."""
    found: dict[nn.Conv2d, Tensor] = {}
    for name, mask in masks.items():
        conv = network.layers.get(name)
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"{name!r} is no Conv2d")
        size = (conv.out_channels,)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != size:
            raise ValueError(f"the mask of {name!r} must be bool of shape ({conv.out_channels},)")
        if conv in found:
            raise ValueError(f"{name!r} is a second name of a layer; give one mask to each layer")
        if mask.any():
            network.check(conv, "weight")
            found[conv] = mask.to(conv.weight.device)
    return found


def _norms_behind(
    model: nn.Module, network: Network, convs: Mapping[nn.Conv2d, Tensor], images: Tensor | None
) -> dict[nn.Module, Tensor]:
    """Return the norms behind frozen filters, and of which channels."""
    found: dict[nn.Module, Tensor] = {}
    behind = trace_flow(model, images).norms
    if any(network.names[conv] not in behind for conv in convs):  # such as an auxiliary head
        behind = trace_flow(model, images, training=True).norms | behind
    for conv, mask in convs.items():
        name = network.names[conv]
        if name not in behind or any(is_norm(layer) for layer in conv.modules()):
            why = "has a norm inside" if name in behind else "did not run on the images tried"
            raise ValueError(f"{name!r} {why}; pass images that it runs on, or batch_norm='none'")
        for norm in behind[name]:
            layer = network.layers[norm]
            found[layer] = found.get(layer, torch.zeros_like(mask)) | mask
    return found
