"""How much a task's answers depend on each single weight."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from permafrost.data import Batches
from permafrost.explain import conv_layers
from permafrost.models import measuring
from permafrost.seeding import generator

IMAGES = 500  # at most, as many of each class
_AT_ONCE = 50


def weight_gradients(
    model: nn.Module, batches: Batches, classes: int, seed: int
) -> dict[str, Tensor]:
    """Sum the sizes of the gradients of the true logits over small batches of one class.

    500 images are drawn with the seed, equally many of each class, and taken 50 of a class at a
    time, unaugmented and in eval mode. A weight w counts ``|w| · Σ |g|``, g the gradient of the sum
    of a batch's true logits: to first order how much they change without it.

    Parameters
    ----------
    model : nn.Module
        The classifier of the task, all of whose weights may have gradients; it is left as it is.
    batches : Batches
        The task's training images, with labels 0 .. C - 1.
    classes : int
        C.
    seed : int
        Of the draw.

    Returns
    -------
    dict of str to Tensor, of the weight's shape
        Σ |g| by convolution, 0 or more.
    """
    convs = conv_layers(model)
    weights = [conv.weight for conv in convs.values()]
    sums = [torch.zeros_like(weight) for weight in weights]
    with measuring(model), torch.enable_grad():
        for images, label in _one_class_each(batches, classes, seed):
            logits = model(images)[:, label].sum()
            torch._foreach_add_(sums, [g.abs() for g in torch.autograd.grad(logits, weights)])
    return dict(zip(convs, sums, strict=True))


def _one_class_each(batches: Batches, classes: int, seed: int) -> Iterator[tuple[Tensor, int]]:
    order = torch.randperm(len(batches), generator=generator(seed, "weight scores"))
    labels = batches.labels.cpu()[order]
    for label in range(classes):
        mine = order[labels == label][: max(1, IMAGES // classes)]
        for positions in mine.split(_AT_ONCE):
            yield batches.at(positions.to(batches.images.device)), label


def permuted(values: Tensor, seed: int, *purpose: str | int) -> Tensor:
    """Return a layer's values in another order, drawn with a seed: what chance makes of them."""
    order = torch.randperm(values.numel(), generator=generator(seed, "chance", *purpose))
    return values.flatten()[order.to(values.device)].view_as(values)
