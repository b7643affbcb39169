"""Saliency maps by any of the methods: of images, and of classes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.explain._checks import check_images, check_range, check_result, check_targets
from permafrost.explain._scopes import explaining
from permafrost.explain.fullgrad import warn_if_incomplete
from permafrost.explain.methods import SALIENCY_METHODS, Reading


@dataclass(frozen=True)
class ClassSaliency:
    """Saliency maps of classes, and how well the decomposition behind them added up.

    Attributes
    ----------
    maps
        (C, H, W), each rescaled to 0..1; a constant map is all zeros.
    completeness
        The largest relative error of any image (by "smooth_fullgrad", of any noisy copy), as
        `completeness_error` defines it. None if the method's terms do not add up to the logit, as
        those of "fullgrad" and "smooth_fullgrad" do.
    """

    maps: Tensor
    completeness: float | None


def saliency_maps(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | Sequence[int],
    method: str = "fullgrad",
    *,
    reading: Reading = "layer",
) -> Tensor:
    """Compute a saliency map for each image, by any method.

    Parameters
    ----------
    model
        Network of images (N, 3, H, W) to logits (N, C). It is run in eval mode; afterwards its
        training flags, gradients and hooks are as they were.
    images
        (N, 3, H, W), normalised, on the model's device and of its type. Not changed.
    targets
        (N,), int64, or a sequence of int: the logit to explain for each image.
    method
        A name in `SALIENCY_METHODS`, or ``module:function`` for a user's own, which
        `saliency_method` decorates.
    reading
        As in `fullgrad`; of methods that have readings only.

    Returns
    -------
    Tensor
        (N, H, W), not rescaled; by the methods of the package 0 or more, of the images' type and
        device.

    Raises
    ------
    InputError
        If the method is unknown, or a user's own gives no maps.
    ValueError
        If a shape or a target does not fit, or as the method's own function.
    """
    function = SALIENCY_METHODS.find(method)
    targets = check_targets(images, targets)
    check_images(images, targets)
    options = {"reading": reading} if function.has_reading else {}
    with explaining(model):
        return _checked(method, function(model, images, targets, **options), images)


def class_saliency(
    model: nn.Module,
    images_by_batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    *,
    method: str = "fullgrad",
    reading: Reading = "layer",
) -> ClassSaliency:
    """Average the maps of each class's images, in one pass over the batches.

    A class's map is the mean of its images' maps, each of the true label's logit, rescaled to
    0..1 by its own minimum and maximum. Sums are kept in float64.

    Parameters
    ----------
    model
        As in `saliency_maps`.
    images_by_batches
        Batches of images (N, 3, H, W), normalised and unaugmented, with labels (N,), int64, in
        0..classes − 1. All images have the same size.
    classes
        Number of classes, C.
    method, reading
        As in `saliency_maps`.

    Returns
    -------
    ClassSaliency
        Maps (C, H, W) of the images' type and device, and the worst completeness error.

    Raises
    ------
    InputError
        As `saliency_maps`.
    ValueError
        If a class has no image, a label is out of range, or as `saliency_maps`.

    Warns
    -----
    UserWarning
        As `fullgrad`, once for all batches.
    """
    decompose = SALIENCY_METHODS.find(method).decompose
    sums: Tensor | None = None
    counts = torch.zeros(classes, dtype=torch.int64)
    errors: list[Tensor] = []
    for images, given in images_by_batches:
        labels = check_targets(images, given)
        check_range(labels, classes, "labels")
        if decompose is not None:
            parts = decompose(model, images, labels, reading)
            maps = _checked(method, parts.maps, images)
            errors.append(parts.errors.max())
        else:
            maps = saliency_maps(model, images, labels, method, reading=reading)
        # A matrix product adds up in a fixed order on every device; index_add_ does not.
        members = F.one_hot(labels, classes).T.double()
        batch = (members @ maps.double().flatten(1)).unflatten(1, maps.shape[1:])
        sums = batch if sums is None else sums + batch
        counts += torch.bincount(labels.cpu(), minlength=classes)
    missing = [label for label, count in enumerate(counts.tolist()) if count == 0]
    if sums is None or missing:
        raise ValueError(f"classes without images: {missing}")
    means = sums / counts.to(sums.device).view(-1, 1, 1)
    worst = torch.stack(errors).max().item() if errors else None
    if errors:
        warn_if_incomplete(model, torch.stack(errors))
    return ClassSaliency(_rescale(means).to(maps.dtype), worst)


def _checked(method: str, maps: object, images: Tensor) -> Tensor:
    shape = (len(images), *images.shape[2:])
    return check_result(f"saliency method '{method}'", maps, shape)


def _rescale(maps: Tensor) -> Tensor:
    """Rescale each of (C, H, W) to 0..1; a constant one becomes zeros."""
    shifted = maps - maps.amin((1, 2), keepdim=True)
    span = shifted.amax((1, 2), keepdim=True)
    return shifted / torch.where(span > 0, span, 1)
