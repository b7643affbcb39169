"""What silencing a filter does to the loss: the truth that other criteria are held against."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.explain import conv_layers
from permafrost.explain._checks import check_logits
from permafrost.ranking.class_scores import checked_labels, class_means
from permafrost.ranking.criteria import FILTERS, network_criterion
from permafrost.ranking.features import feature_layers

IMAGES = 500  # at most, as many of each class
_AT_ONCE = 8  # filters that are silenced beside each other

ImageBatches = Iterable[tuple[Tensor, Tensor]]


@network_criterion(passes=FILTERS)
def ablation(model: nn.Module, images_by_batches: ImageBatches, classes: int) -> dict[str, Tensor]:
    """Measure how much the loss of every class grows when one filter is silenced.

    Silenced is the filter's feature map, behind its norm and before the ReLU, by zeros. Every
    filter takes a pass of its own from its layer on over the first images of each class, 500 in
    all; what lies below the layer is computed once as far as the network is a chain of modules.

    Parameters
    ----------
    model, images_by_batches, classes
        As for :func:`permafrost.ranking.filter_responses`.

    Returns
    -------
    scores : dict[str, Tensor (F, C)]
        By layer, the growth of the mean cross entropy in nats, of any sign.
    """
    layers: dict[str, str] = {}
    widths = {name: layer.out_channels for name, layer in conv_layers(model).items()}

    @torch.no_grad()
    def measure(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        layers.update(layers or feature_layers(model, images[:1]))
        whole = _losses(check_logits(model(images), labels, "labels"), labels)
        return {
            name: _silenced(model, module, widths[name], images, labels) - whole[:, None]
            for name, module in layers.items()
        }

    return class_means(measure, first_of_each_class(images_by_batches, classes), classes)


def first_of_each_class(
    images_by_batches: ImageBatches, classes: int, count: int = IMAGES
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first images of each class, so many in all, in their batches."""
    left = torch.full((classes,), max(1, count // classes))
    for images, given in images_by_batches:
        labels = checked_labels(images, given, classes)
        members = F.one_hot(labels.cpu(), classes)
        is_among = (members * (members.cumsum(0) <= left)).any(1)
        left = (left - members.sum(0)).clamp(min=0)
        if is_among.any():
            chosen = is_among.to(labels.device)
            yield images[chosen], labels[chosen]


@contextmanager
def silenced(
    model: nn.Module, layers: Mapping[str, str], masks: Mapping[str, Tensor]
) -> Iterator[None]:
    """Within the block, set the feature maps of filters to 0, behind their norm.

    Parameters
    ----------
    model : nn.Module
        Any network.
    layers : mapping of str to str
        As :func:`permafrost.ranking.features.feature_layers` gives them.
    masks : mapping of str to Tensor of bool, shape (F,)
        By convolution, True for each filter that is silenced.
    """

    def silence(mask: Tensor) -> Callable[..., Tensor]:
        return lambda _m, _i, output: output.masked_fill(mask.to(output.device)[:, None, None], 0.0)

    handles = [
        model.get_submodule(layers[name]).register_forward_hook(silence(mask))
        for name, mask in masks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _silenced(model: nn.Module, module: str, width: int, images: Tensor, labels: Tensor) -> Tensor:
    """Return each image's loss without each filter of a layer, (N, F)."""
    below, above = _split(model, module)
    inputs = below(images)
    reached, count = model.get_submodule(module), len(images)
    losses: list[Tensor] = []
    filters: tuple[int, ...] = ()

    def silence(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        silenced = output.clone().unflatten(0, (-1, count))
        for place, index in enumerate(filters):
            silenced[place, :, index] = 0
        return silenced.flatten(0, 1)

    handle = reached.register_forward_hook(silence)
    try:
        for first in range(0, width, _AT_ONCE):
            filters = tuple(range(first, min(first + _AT_ONCE, width)))
            logits = above(inputs.repeat(len(filters), *[1] * (inputs.ndim - 1)))
            losses += _losses(logits, labels.repeat(len(filters))).split(count)
    finally:
        handle.remove()
    return torch.stack(losses, dim=1)


def _split(
    model: nn.Module, module: str
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Split a network as deep below a module as it is a chain."""
    below: list[nn.Module] = []
    above: list[nn.Module] = []
    here, path = model, module.split(".")
    while path and type(here) is nn.Sequential:
        name = path.pop(0)
        children = here._modules  # a module that stands twice is among them twice
        place = list(children).index(name)
        modules = [module for module in children.values() if module is not None]
        below += modules[:place]
        above = modules[place + 1 :] + above
        here = modules[place]
    return nn.Sequential(*below), nn.Sequential(here, *above)
