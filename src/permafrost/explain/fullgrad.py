"""FullGrad: a logit taken apart into what the input and every bias contribute to it.

Srinivas and Fleuret, "Full-Gradient Representation for Neural Network Visualization" (NeurIPS
2019). For a network of linear and piecewise-linear layers whose kinks lie at zero, proposition 1
says that a logit is

    f_c(x) = ⟨∇ₓ f_c, x⟩ + Σ_l ⟨∇_{b_l} f_c, b_l⟩

over every bias b_l, where BatchNorm in eval mode has the implicit bias β − γμ / √(σ² + ε). The
saliency map lays these terms, apart from those of linear layers, over the image (equation 6).

Biases are taken from what runs: the bias that a convolution, a linear function or a norm is called
with, by whichever module or none, and constants that a ``forward`` adds.

The authors' repository, idiap/fullgrad-saliency, has two variants that the paper has not:
`simple_fullgrad` leaves the biases out, `smooth_fullgrad` averages the terms over noisy copies.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from permafrost.explain._checks import check_images, check_logits, check_maps, check_targets
from permafrost.explain._scopes import explaining
from permafrost.explain.methods import Decomposition, Reading, saliency_method
from permafrost.models.units import runs_as

# Of smooth_fullgrad, as the authors' code sets them.
_COPIES = 25
_SPREAD = 0.15

# A completeness error above rounding, in units of the spacing of numbers: 1e-4 in float32.
_ROUNDING = 1e-4 / torch.finfo(torch.float32).eps

_CONVOLUTIONS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_DIFFERENCES = {"sub", "sub_", "__sub__", "__isub__", "subtract", "subtract_"}
_REVERSED = {"rsub", "__rsub__"}

# Modules that are linear in eval mode, or piecewise linear with every kink at zero. A kink
# elsewhere (ReLU6, Hardtanh) is a bias of its own, which no parameter holds.
_PIECEWISE_LINEAR = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.Flatten, nn.Unflatten, nn.Identity),
    *(nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
    *(nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    nn.Sequential,  # an empty one is a leaf: the identity
)


def decompose(
    model: nn.Module, images: Tensor, targets: Tensor | Sequence[int], reading: Reading
) -> Decomposition:
    """Return the maps of `fullgrad` and the errors of `completeness_error` from one pass."""
    targets = check_targets(images, targets)
    return _backpropagate(model, images, targets, _Terms(images, reading))


def decompose_smoothed(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | Sequence[int],
    reading: Reading,
    seed: int = 0,
) -> Decomposition:
    """Return the maps of `smooth_fullgrad` and, of each image, its copies' largest error."""
    targets = check_targets(images, targets)
    check_images(images, targets)
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float32 whatever the images are: other types have other streams.
    noise = torch.randn(_COPIES, *images.shape[1:], generator=generator, dtype=torch.float32).to(
        images
    )
    parts = []
    for image, target in zip(images, targets, strict=True):
        # An image's copies are a batch: they are averaged as the backward pass meets them.
        copies = image + _SPREAD * (image.max() - image.min()) * noise
        terms = _SmoothedTerms(copies, reading)
        parts.append(_backpropagate(model, copies, target.expand(_COPIES), terms))
    return Decomposition(
        torch.cat([part.maps for part in parts]), torch.stack([part.errors.max() for part in parts])
    )


@saliency_method(has_reading=True, decompose=decompose)
def fullgrad(
    model: nn.Module, images: Tensor, targets: Tensor | Sequence[int], *, reading: Reading = "layer"
) -> Tensor:
    """Compute FullGrad saliency maps (Srinivas and Fleuret 2019, equation 6).

    The map of an image is ψ(∇ₓf ⊙ x) + Σ_l Σ_channels ψ(∇_{b_l}f ⊙ b_l) over the biases of maps
    (N, C, h, w): those of convolutions, transposed or not, the implicit ones of norms with kept
    statistics, and constants that are added. ψ takes absolute values, rescales them by minimum
    and maximum, and interpolates them bilinearly to the size of the image. Biases of linear layers
    have no place in the image and do not enter. One forward and one backward pass serve the whole
    batch.

    Parameters
    ----------
    model
        Network of images (N, 3, H, W) to logits (N, C). It is run in eval mode; afterwards its
        training flags, gradients and hooks are as they were.
    images
        (N, 3, H, W), normalised, on the model's device and of its type. Not changed.
    targets
        (N,), int64, or a sequence of int: the logit to explain for each image.
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
        If `reading` is unknown, a shape or a target does not fit, or a BatchNorm keeps no running
        statistics (its images would depend on each other).
    NotFiniteError
        If a logit or a map is not finite.

    Warns
    -----
    UserWarning
        If the terms do not add up to the logits (see `completeness_error`): by how much, and which
        modules are not piecewise linear.
    """
    parts = decompose(model, images, targets, reading)
    warn_if_incomplete(model, parts.errors)
    return parts.maps


@saliency_method(has_reading=True)
def simple_fullgrad(
    model: nn.Module, images: Tensor, targets: Tensor | Sequence[int], *, reading: Reading = "layer"
) -> Tensor:
    """Compute simple FullGrad maps: `fullgrad` with gradients in place of gradients times bias.

    The map of an image is ψ(∇ₓf ⊙ x) + Σ_l Σ_channels ψ(∇_{b_l}f), over the layers that have a
    bias. This is no decomposition: the terms do not add up to the logit. In the authors' code a
    BatchNorm without parameters does not enter; here it does, since it has an implicit bias.

    Parameters
    ----------
    model, images, targets, reading
        As in `fullgrad`.

    Returns
    -------
    Tensor
        (N, H, W), 0 or more, not rescaled, of the images' type and device.

    Raises
    ------
    ValueError
        As `fullgrad`.
    """
    targets = check_targets(images, targets)
    return _backpropagate(model, images, targets, _SimpleTerms(images, reading)).maps


@saliency_method(has_reading=True, decompose=decompose_smoothed)
def smooth_fullgrad(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | Sequence[int],
    *,
    reading: Reading = "layer",
    seed: int = 0,
) -> Tensor:
    """Compute FullGrad maps of terms that are averaged over noisy copies of each image.

    The terms of 25 copies with normal noise are averaged with their signs, as gradients are in
    Smilkov, Thorat, Kim, Viégas and Wattenberg, "SmoothGrad: removing noise by adding noise"
    (2017), and then laid over the image as in `fullgrad`; the input's term is summed over the
    colours first, as in the authors' code. The noise's deviation is 0.15 times the range of the
    image, of each by itself where the authors take the range of the batch.

    Parameters
    ----------
    model, images, targets, reading
        As in `fullgrad`.
    seed
        Draws the noise on the CPU. Every image gets the same 25 patterns, scaled by its own
        range, so that its map depends neither on the batch it is in nor on its place there.

    Returns
    -------
    Tensor
        (N, H, W), 0 or more, not rescaled, of the images' type and device.

    Raises
    ------
    ValueError
        As `fullgrad`.

    Warns
    -----
    UserWarning
        As `fullgrad`.
    """
    parts = decompose_smoothed(model, images, targets, reading, seed)
    warn_if_incomplete(model, parts.errors)
    return parts.maps


def completeness_error(model: nn.Module, images: Tensor, targets: Tensor | Sequence[int]) -> Tensor:
    """Measure how far the FullGrad decomposition is from adding up to the logit.

    The terms are the inner products of proposition 1, one for the input and one for each time that
    a bias is added (by a convolution, a linear layer, a norm, or a ``forward`` itself):
    t_0 = ⟨∇ₓf, x⟩ and t_l = ⟨∇_{b_l}f, b_l⟩. The error is abs(f − Σ t) / Σ abs(t).

    Σ abs(t) is the stricter of two scales: taking absolute values of each term's elements instead
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
    return decompose(model, images, targets, "layer").errors


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
        GELU, Hardswish, Sigmoid ...), other normalisations, ReLU6, unknown modules and subclasses
        with a ``forward`` of their own make it False. Functions called in a container's
        ``forward`` are not seen.
    """
    return not _unknown_modules(model)


def _unknown_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name the modules that are not known to be piecewise linear."""
    unknown = {}
    for name, module in model.named_modules():
        # What derives a weight does not meet the data.
        if "parametrizations" in name.split("."):
            continue
        bases = [base for base in _PIECEWISE_LINEAR if isinstance(module, base)]
        container = not bases or bases == [nn.Sequential]
        children = (child for child, _ in module.named_children() if child != "parametrizations")
        if container and next(children, None) is not None:
            continue
        if not any(runs_as(module, base) for base in bases):
            unknown[name] = module
    return unknown


def warn_if_incomplete(model: nn.Module, errors: Tensor) -> None:
    """Warn, in one line, if the terms do not add up to the logits; name what may be the cause."""
    worst = errors.max().item() if len(errors) else 0.0
    if worst <= _ROUNDING * torch.finfo(errors.dtype).eps:
        return
    unknown = [f"{name!r} ({type(m).__name__})" for name, m in _unknown_modules(model).items()]
    if len(unknown) > 5:
        unknown[5:] = [f"{len(unknown) - 5} more"]
    cause = (
        f"not piecewise linear, or with a bias that is not seen: {', '.join(unknown)}"
        if unknown
        else "something in `forward` that is no module holds a bias or is not piecewise linear"
    )
    warnings.warn(
        f"FullGrad's terms do not add up to the logit (completeness error {worst:.2g}): {cause}",
        UserWarning,
        stacklevel=3,
    )


class _Terms:
    """Adds up terms as the backward pass meets them, so that no layer's gradient is kept."""

    def __init__(self, images: Tensor, reading: Reading):
        if reading not in ("layer", "channel"):
            raise ValueError(f"reading {reading!r}: must be 'layer' or 'channel'")
        self.reading = reading
        self.size = images.shape[2:]
        self.maps = images.new_zeros(())
        self.total = images.new_zeros(len(images))
        self.scale = images.new_zeros(len(images))

    def add_input(self, product: Tensor) -> None:
        """Add the input's term: gradient times image, element by element."""
        self._count(product)
        self._lay(self.of_input(product))

    def add_layer(self, gradient: Tensor, bias: Tensor, *, on_image: bool) -> None:
        """Add a layer's term: the gradient at its output times its bias, element by element."""
        product = gradient * bias
        if len(product) != len(self.total):
            return  # the batch was rearranged: whose term this is cannot be told
        self._count(product)
        if on_image:
            self._lay(self.of_layer(gradient, product))

    def of_input(self, product: Tensor) -> Tensor:
        """Return what is laid over the image of the input's term, 0 or more; may reuse it."""
        return product.abs_()

    def of_layer(self, gradient: Tensor, product: Tensor) -> Tensor:
        """Return what is laid over the image of a layer's term, 0 or more; may reuse `product`."""
        return product.abs_()

    def errors(self, logits: Tensor) -> Tensor:
        smallest = torch.finfo(self.scale.dtype).tiny
        return (logits - self.total).abs() / self.scale.clamp(min=smallest)

    def _count(self, product: Tensor) -> None:
        term = product.sum(tuple(range(1, product.ndim)))
        self.total += term
        self.scale += term.abs()

    def _lay(self, values: Tensor) -> None:
        self.maps = self.maps + _overlay(values, self.size, self.reading)


class _SimpleTerms(_Terms):
    """Of a layer the gradient alone is laid over the image."""

    def of_layer(self, gradient: Tensor, product: Tensor) -> Tensor:
        return gradient.abs()


class _SmoothedTerms(_Terms):
    """The batch holds copies of one image: one map of their averaged terms."""

    def of_input(self, product: Tensor) -> Tensor:
        return product.mean(0, keepdim=True).sum(1, keepdim=True).abs()

    def of_layer(self, gradient: Tensor, product: Tensor) -> Tensor:
        return product.mean(0, keepdim=True).abs()


def _backpropagate(
    model: nn.Module, images: Tensor, targets: Tensor, terms: _Terms
) -> Decomposition:
    """Take the targets' logits apart in one forward and one backward pass."""
    check_images(images, targets)
    x = images.detach().clone().requires_grad_()
    with explaining(model), _constant_parameters(model):
        with _BiasTerms(terms):
            # A copy, since a network may begin with an in-place operation.
            logits = model(x.clone())
        check_logits(logits, targets)
        chosen = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
        # Only the input's gradient is asked for, so no weight gradient is computed.
        (gradient,) = torch.autograd.grad(chosen.sum(), x)
    terms.add_input(gradient * x.detach())
    return Decomposition(check_maps(terms.maps), terms.errors(chosen.detach()))


def fullgrad_with_graph(answer: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Compute FullGrad maps that a loss can be made of: its gradient flows into the weights.

    Parameters
    ----------
    answer
        Gives one logit of each image, (N,), of a network in eval mode, from images (N, 3, H, W).
        Biases are taken from what runs, as in `fullgrad`; a parameter that a ``forward`` adds
        itself is left out.
    images
        (N, 3, H, W), normalised.

    Returns
    -------
    Tensor
        (N, H, W), 0 or more, not rescaled, as the reading "layer" lays them out; nothing is
        checked, so that no GPU is waited for.
    """
    x = images.detach().clone().requires_grad_()
    terms = _Terms(images, "layer")
    with torch.enable_grad():
        with _BiasTerms(terms):
            logits = answer(x.clone())
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        terms.add_input(gradient * x.detach())
    return terms.maps


@contextmanager
def _constant_parameters(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter asks for a gradient: what does depends on the images."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()


class _BiasTerms(TorchFunctionMode):
    """Within the block, add to `terms` the gradient and bias of each call that adds a bias.

    The gradient comes from a hook on the output tensor itself, set before a later in-place
    operation (ReLU, a residual sum) can overwrite it: autograd then gives the gradient of the
    value as the call returned it, which `retain_grad` does not.
    """

    def __init__(self, terms: _Terms):
        super().__init__()
        self.terms = terms

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Before the call, which may be in place and make what it writes to depend on the images.
        bias = _bias(func, args, kwargs)
        output = func(*args, **kwargs)
        if bias is not None and isinstance(output, Tensor) and output.requires_grad:
            # Channels are the second dimension, but a linear layer's features are the last one.
            on_image = func is not F.linear and output.ndim == 4
            if func is not F.linear and bias.ndim == 1 and _adds_by_channel(func):
                bias = bias.view(-1, *[1] * (output.ndim - 2))
            shaped = bias
            output.register_hook(
                lambda gradient: self.terms.add_layer(gradient, shaped, on_image=on_image)
            )
        return output


def _adds_by_channel(func: Callable[..., Any]) -> bool:
    return func in _CONVOLUTIONS or func in (F.batch_norm, F.instance_norm)


def _bias(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Return the bias that a call adds, as it is now; None if it adds none that is constant."""
    if func is F.linear or func in _CONVOLUTIONS:
        found: Tensor | None = kwargs.get("bias", args[2] if len(args) > 2 else None)
        return found
    if func is F.batch_norm or func is F.instance_norm:
        call = inspect.signature(func).bind(*args, **kwargs)
        call.apply_defaults()
        return _implicit_bias(func, call.arguments)
    name = getattr(func, "__name__", "")
    if name in _SUMS or name in _DIFFERENCES or name in _REVERSED:
        return _added_constant(name, args, kwargs)
    return None


def _implicit_bias(func: Callable[..., Any], call: Mapping[str, Any]) -> Tensor | None:
    """Return a norm's implicit bias, β − γμ / √(σ² + ε), if it normalises by kept statistics."""
    if func is F.instance_norm and call["use_input_stats"]:
        return None
    if func is F.batch_norm and call["training"]:
        raise ValueError("a BatchNorm without running statistics has no implicit bias")
    shift: Tensor = -call["running_mean"] / torch.sqrt(call["running_var"] + call["eps"])
    if call["weight"] is not None:
        shift = call["weight"] * shift
    return shift if call["bias"] is None else call["bias"] + shift


def _added_constant(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return what a sum or difference adds to a tensor that depends on the images."""
    pair = [*args, *(kwargs[key] for key in ("input", "other") if key in kwargs)][:2]
    if len(pair) != 2 or kwargs.get("out") is not None:
        return None
    first, second = reversed(pair) if name in _REVERSED else pair
    if not any(isinstance(value, Tensor) and value.requires_grad for value in pair):
        return None
    if _depends(first) and _depends(second):
        return None
    moving, constant = (first, second) if _depends(first) else (second, first)
    # A number is the bias of maps alone: elsewhere it has no place in any layer.
    if not isinstance(constant, Tensor) and moving.ndim != 4:
        return None
    zero = moving.new_zeros(())
    alpha = kwargs.get("alpha", 1)
    if name in _SUMS:
        return torch.add(zero, constant, alpha=alpha if constant is second else 1)
    return torch.sub(zero, constant, alpha=alpha) if constant is second else zero + constant


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _overlay(values: Tensor, size: torch.Size, reading: Reading) -> Tensor:
    """Apply ψ to absolute values (N, C, h, w), which are used up, and sum the channels: (N, H, W).

    Channels are summed before the interpolation, which is linear, so that one map is
    interpolated instead of C.
    """
    together = reading == "layer"
    dims, eps = ((1, 2, 3), 1e-6) if together else ((2, 3), 1e-7)
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    span = high - low + eps
    # Shifted before it is summed: the sum of large equal values would lose what sets them apart.
    shifted = values - low if values.requires_grad else values.sub_(low)
    if together:  # one factor for all channels
        summed = shifted.sum(dim=1, keepdim=True) / span
    else:
        summed = shifted.div_(span).sum(dim=1, keepdim=True)
    return F.interpolate(summed, size, mode="bilinear", align_corners=together).squeeze(1)
