"""FullGrad: a logit taken apart into what the input and every bias contribute to it.

Srinivas and Fleuret, "Full-Gradient Representation for Neural Network Visualization" (NeurIPS
2019). For a network of linear and piecewise-linear layers whose kinks lie at zero, proposition 1
says that a logit is

    f_c(x) = ⟨∇ₓ f_c, x⟩ + Σ_l ⟨∇_{b_l} f_c, b_l⟩

over every bias b_l, where BatchNorm in eval mode has the implicit bias β − γμ / √(σ² + ε). The
saliency map lays these terms, apart from those of linear layers, over the image (equation 6).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from permafrost.explain._scopes import explaining

Reading = Literal["layer", "channel"]

_Biased = nn.Conv2d | nn.Linear | _BatchNorm

# Modules that are linear in eval mode, or piecewise linear with every kink at zero. A kink
# elsewhere (ReLU6, Hardtanh) is a bias of its own, which no parameter holds.
_PIECEWISE_LINEAR = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.ZeroPad2d,
    nn.Upsample,
    nn.PixelShuffle,
    nn.ChannelShuffle,
    nn.Sequential,  # an empty one is a leaf: the identity
)


@dataclass(frozen=True)
class ClassSaliency:
    """Saliency maps of classes, and how well the decomposition behind them added up.

    Attributes
    ----------
    maps
        (C, H, W), each rescaled to 0..1; a constant map is all zeros.
    completeness
        The largest relative error of any image, as `completeness_error` defines it.
    """

    maps: Tensor
    completeness: float


def fullgrad(
    model: nn.Module, images: Tensor, targets: Tensor, *, reading: Reading = "layer"
) -> Tensor:
    """Compute FullGrad saliency maps (Srinivas and Fleuret 2019, equation 6).

    The map of an image is ψ(∇ₓf ⊙ x) + Σ_l Σ_channels ψ(∇_{b_l}f ⊙ b_l) over convolutions with a
    bias and 2-D BatchNorms, where ψ takes absolute values, rescales them by minimum and maximum,
    and interpolates them bilinearly to the size of the image. Biases of linear layers have no
    place in the image and do not enter. One forward and one backward pass serve the whole batch.

    Parameters
    ----------
    model
        Network of images (N, 3, H, W) to logits (N, C). It is run in eval mode; afterwards its
        training flags, gradients and hooks are as they were.
    images
        (N, 3, H, W), normalised, on the model's device and of its type. Not changed.
    targets
        (N,), int64: the logit to explain for each image.
    reading
        Which published code to follow. "layer" (the authors'): rescaled over all channels of a
        layer together, 1e-6 added to the maximum, corners aligned. "channel"
        (pytorch-grad-cam's): each channel rescaled by itself, 1e-7 added, corners not aligned.

    Returns
    -------
    Tensor
        (N, H, W), 0 or more, not rescaled, of the images' type and device.

    Raises
    ------
    ValueError
        If `reading` is unknown, a shape or a target does not fit, a logit is not finite, or a
        BatchNorm keeps no running statistics (its images would depend on each other).
    """
    return _decompose(model, images, targets, reading).maps


def completeness_error(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Measure how far the FullGrad decomposition is from adding up to the logit.

    The terms are the inner products of proposition 1, one for the input and one for each run of
    each layer that has a bias (convolution, linear, BatchNorm): t_0 = ⟨∇ₓf, x⟩ and
    t_l = ⟨∇_{b_l}f, b_l⟩. The error is |f − Σ t| / Σ|t|.

    Σ|t| is the stricter of two scales: taking absolute values of each term's elements instead
    would give a larger sum, in which a wrong small term could hide. It is still safe for logits
    near zero, which are differences of large terms.

    Parameters
    ----------
    model, images, targets
        As in `fullgrad`.

    Returns
    -------
    Tensor
        (N,), relative error, 0 or more: rounding alone for a network of which
        `is_piecewise_linear` is true, without bound for others.

    Raises
    ------
    ValueError
        As `fullgrad`.
    """
    return _decompose(model, images, targets, "layer").errors


def is_piecewise_linear(model: nn.Module) -> bool:
    """Tell whether completeness must hold for a network, up to rounding.

    Parameters
    ----------
    model
        Any module.

    Returns
    -------
    bool
        True if every module without children is known to be linear in eval mode or piecewise
        linear with its kinks at zero (ReLU, LeakyReLU, pooling ...). Smooth activations (SiLU,
        GELU, Hardswish, Sigmoid ...), other normalisations, ReLU6 and unknown modules make it
        False. Functions called in a ``forward`` are not seen.
    """
    leaves = (module for module in model.modules() if next(module.children(), None) is None)
    return all(isinstance(leaf, _PIECEWISE_LINEAR) for leaf in leaves)


def class_saliency(
    model: nn.Module,
    images_by_batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    *,
    reading: Reading = "layer",
) -> ClassSaliency:
    """Average the FullGrad maps of each class's images, in one pass over the batches.

    A class's map is the mean of its images' maps, each of the true label's logit, rescaled to
    0..1 by its own minimum and maximum. Sums are kept in float64.

    Parameters
    ----------
    model
        As in `fullgrad`.
    images_by_batches
        Batches of images (N, 3, H, W), normalised and unaugmented, with labels (N,), int64, in
        0..classes − 1. All images have the same size.
    classes
        Number of classes, C.
    reading
        As in `fullgrad`.

    Returns
    -------
    ClassSaliency
        Maps (C, H, W) of the images' type and device, and the worst completeness error.

    Raises
    ------
    ValueError
        If a class has no image, a label is out of range, or as `fullgrad`.
    """
    sums: Tensor | None = None
    counts = torch.zeros(classes, dtype=torch.int64)
    errors: list[Tensor] = []
    for images, labels in images_by_batches:
        _check_range(labels, classes, "labels")
        parts = _decompose(model, images, labels, reading)
        # A matrix product adds up in a fixed order on every device; index_add_ does not.
        members = F.one_hot(labels, classes).T.double()
        batch = (members @ parts.maps.double().flatten(1)).unflatten(1, parts.maps.shape[1:])
        sums = batch if sums is None else sums + batch
        counts += torch.bincount(labels.cpu(), minlength=classes)
        errors.append(parts.errors.max())
    missing = [label for label, count in enumerate(counts.tolist()) if count == 0]
    if sums is None or missing:
        raise ValueError(f"classes without images: {missing}")
    means = sums / counts.to(sums.device).view(-1, 1, 1)
    return ClassSaliency(_rescale(means).to(parts.maps.dtype), torch.stack(errors).max().item())


@dataclass(frozen=True)
class _Parts:
    """What `_decompose` finds: maps (N, H, W) and relative completeness errors (N,)."""

    maps: Tensor
    errors: Tensor


class _Terms:
    """Adds up terms as the backward pass meets them, so that no layer's gradient is kept."""

    def __init__(self, images: Tensor, reading: Reading):
        self.reading = reading
        self.size = images.shape[2:]
        self.maps = images.new_zeros(len(images), *self.size)
        self.total = images.new_zeros(len(images))
        self.scale = images.new_zeros(len(images))

    def add(self, product: Tensor, *, on_image: bool) -> None:
        """Add a term: the gradient times the input or bias, element by element."""
        term = product.flatten(1).sum(1)
        self.total += term
        self.scale += term.abs()
        if on_image:
            self.maps += _overlay(product.abs(), self.size, self.reading)

    def errors(self, logits: Tensor) -> Tensor:
        smallest = torch.finfo(self.scale.dtype).tiny
        return (logits - self.total).abs() / self.scale.clamp(min=smallest)


def _decompose(model: nn.Module, images: Tensor, targets: Tensor, reading: Reading) -> _Parts:
    """Take the targets' logits apart in one forward and one backward pass."""
    if reading not in ("layer", "channel"):
        raise ValueError(f"reading {reading!r}: must be 'layer' or 'channel'")
    if images.ndim != 4 or targets.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"images must be (N, 3, H, W) and targets (N,), not {shapes}")
    x = images.detach().clone().requires_grad_()
    terms = _Terms(images, reading)
    with explaining(model), _bias_terms(model, terms):
        # A copy, since a network may begin with an in-place operation.
        chosen = _chosen_logits(model(x.clone()), targets)
        # Only the input's gradient is asked for, so no weight gradient is computed.
        (gradient,) = torch.autograd.grad(chosen.sum(), x)
    terms.add(gradient * x.detach(), on_image=True)
    return _Parts(terms.maps, terms.errors(chosen.detach()))


def _chosen_logits(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.ndim != 2:
        raise ValueError(f"the model must return logits (N, C), not {tuple(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are not all finite")
    _check_range(targets, logits.shape[1], "targets")
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1)


def _check_range(labels: Tensor, classes: int, what: str) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{what} must lie in 0..{classes - 1}")


@contextmanager
def _bias_terms(model: nn.Module, terms: _Terms) -> Iterator[None]:
    """Within the block, add to `terms` gradient times bias of each run of each biased layer.

    The gradient comes from a hook on the output tensor itself, set before a later in-place
    operation (ReLU, a residual sum) can overwrite it: autograd then gives the gradient of the
    value as the layer returned it, which `retain_grad` does not.
    """

    def watch(layer: _Biased, _inputs: object, output: Tensor) -> None:
        bias = _bias(layer)
        if bias is None or not output.requires_grad:
            return
        # Channels are the second dimension, but a linear layer's features are the last one.
        channels = not isinstance(layer, nn.Linear)
        shaped = bias.view(-1, *[1] * (output.ndim - 2)) if channels else bias
        on_image = channels and output.ndim == 4
        output.register_hook(lambda gradient: terms.add(gradient * shaped, on_image=on_image))

    handles: list[RemovableHandle] = []
    try:
        for layer in model.modules():
            if isinstance(layer, _Biased):
                handles.append(layer.register_forward_hook(watch))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bias(layer: _Biased) -> Tensor | None:
    """Return a layer's bias as it is now; for BatchNorm the implicit one, β − γμ / √(σ² + ε)."""
    if not isinstance(layer, _BatchNorm):
        return None if layer.bias is None else layer.bias.detach()
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError("a BatchNorm without running statistics has no implicit bias")
    shift = -layer.running_mean / torch.sqrt(layer.running_var + layer.eps)
    if layer.weight is None:
        return shift
    return (layer.bias + layer.weight * shift).detach()


def _overlay(values: Tensor, size: torch.Size, reading: Reading) -> Tensor:
    """Apply ψ to absolute values (N, C, h, w) and sum the channels: (N, H, W).

    Channels are summed before the interpolation, which is linear, so that one map is
    interpolated instead of C.
    """
    together = reading == "layer"
    dims, eps = ((1, 2, 3), 1e-6) if together else ((2, 3), 1e-7)
    shifted = values - values.amin(dims, keepdim=True)
    rescaled = shifted / (shifted.amax(dims, keepdim=True) + eps)
    summed = rescaled.sum(dim=1, keepdim=True)
    return F.interpolate(summed, size, mode="bilinear", align_corners=together).squeeze(1)


def _rescale(maps: Tensor) -> Tensor:
    """Rescale each of (C, H, W) to 0..1; a constant one becomes zeros."""
    shifted = maps - maps.amin((1, 2), keepdim=True)
    span = shifted.amax((1, 2), keepdim=True)
    return shifted / torch.where(span > 0, span, 1)
