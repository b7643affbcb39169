"""Saliency maps by any of the methods: of images, and of classes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.explain._checks import check_range, check_targets
from permafrost.explain.attribution import (
    gradcam,
    guided_backprop,
    input_x_gradient,
    integrated_gradients,
)
from permafrost.explain.fullgrad import (
    Reading,
    decompose,
    decompose_smoothed,
    fullgrad,
    simple_fullgrad,
    smooth_fullgrad,
    warn_if_incomplete,
)

_FULLGRADS = {
    "fullgrad": fullgrad,
    "simple_fullgrad": simple_fullgrad,
    "smooth_fullgrad": smooth_fullgrad,
}

# Those whose terms add up to the logit: maps and errors from the same pass.
_DECOMPOSITIONS = {"fullgrad": decompose, "smooth_fullgrad": decompose_smoothed}

#: Model, images (N, 3, H, W) and targets (N,) to maps (N, H, W), by name.
SALIENCY_METHODS: dict[str, Callable[..., Tensor]] = {
    **_FULLGRADS,
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": integrated_gradients,
    "guided_backprop": guided_backprop,
    "gradcam": gradcam,
}


@dataclass(frozen=True)
class ClassSaliency:
    """Saliency maps of classes, and how well the decomposition behind them added up.

    Attributes
    ----------
    maps
        (C, H, W), each rescaled to 0..1; a constant map is all zeros.
    completeness
        The largest relative error of any image (by "smooth_fullgrad", of any noisy copy), as
        `completeness_error` defines it. None if the method's terms do not add up to the logit:
        all but "fullgrad" and "smooth_fullgrad".
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
    """Compute a saliency map for each image by a method of `SALIENCY_METHODS`.

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
        A name in `SALIENCY_METHODS`.
    reading
        As in `fullgrad`; of the three FullGrad methods only.

    Returns
    -------
    Tensor
        (N, H, W), 0 or more, not rescaled, of the images' type and device.

    Raises
    ------
    ValueError
        If the method is unknown, or as the method's own function.
    """
    _check_method(method)
    if method in _FULLGRADS:
        return _FULLGRADS[method](model, images, targets, reading=reading)
    return SALIENCY_METHODS[method](model, images, targets)


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
    ValueError
        If a class has no image, a label is out of range, or as `saliency_maps`.

    Warns
    -----
    UserWarning
        As `fullgrad`, once for all batches.
    """
    _check_method(method)
    sums: Tensor | None = None
    counts = torch.zeros(classes, dtype=torch.int64)
    errors: list[Tensor] = []
    for images, given in images_by_batches:
        labels = check_targets(images, given)
        check_range(labels, classes, "labels")
        if method in _DECOMPOSITIONS:
            parts = _DECOMPOSITIONS[method](model, images, labels, reading)
            maps = parts.maps
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


def _check_method(method: str) -> None:
    if method not in SALIENCY_METHODS:
        raise ValueError(f"method {method!r}: must be one of {', '.join(SALIENCY_METHODS)}")


def _rescale(maps: Tensor) -> Tensor:
    """Rescale each of (C, H, W) to 0..1; a constant one becomes zeros."""
    shifted = maps - maps.amin((1, 2), keepdim=True)
    span = shifted.amax((1, 2), keepdim=True)
    return shifted / torch.where(span > 0, span, 1)
