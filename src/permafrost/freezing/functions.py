"""The operations behind partly frozen layers: no gradient is computed that nothing needs.

Each gives what the plain layers give under autograd, up to rounding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten

# The largest map, in pixels, of which a CPU multiplies the short weight gradient as one matrix:
# there its convolutions take two to ten times as long.
_SMALL_MAP = 16


def compute_dtype(inputs: Tensor) -> torch.dtype:
    """Return the type that a convolution of these inputs computes in: autocast's, or theirs."""
    device = inputs.device.type
    if inputs.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return inputs.dtype
    return torch.get_autocast_dtype(device)


class LiveRowsConv2d(torch.autograd.Function):
    """A convolution whose weight gradient is computed for the live filters only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        live_weight: Tensor | None,
        live_bias: Tensor | None,
        live_index: Tensor,
        geometry: tuple[list[int], list[int], list[int]],
    ) -> Tensor:
        """Convolve (N, I, H, W) to (N, F, h, w).

        Parameters
        ----------
        inputs : Tensor, shape (N, I, H, W)
            The layer's input.
        weight : Tensor, shape (F, I, kH, kW)
            All filters; no gradient is given for it.
        bias : Tensor, shape (F,), or None
            All biases; no gradient is given for it.
        live_weight, live_bias : Tensor, shape (L, ...), or None
            The rows of ``weight`` and ``bias`` that get the gradient.
        live_index : Tensor of int64, shape (L,)
            Where they stand.
        geometry : tuple of list of int
            Stride, padding and dilation.
        """
        return torch.conv2d(inputs, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradients are made of."""
        images, weight, _, live_weight, _, live_index, ctx.geometry = inputs
        ctx.save_for_backward(images, weight, live_weight, live_index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs and of the live rows."""
        (gradient,) = gradients
        inputs, weight, live_weight, live_index = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        needs_inputs, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        to_inputs = to_weight = to_bias = None
        if torch.is_grad_enabled() and needs_weight:  # for second derivatives
            weight = weight.index_copy(0, live_index, live_weight.to(weight.dtype))

        def transpose(output: Tensor, filters: Tensor, mask: list[bool]) -> Any:
            return _aten.convolution_backward(
                output, inputs, filters, [len(filters)], stride, padding, dilation, False, [0, 0],
                1, mask,
            )  # fmt: skip

        if needs_inputs:
            to_inputs, _, _ = transpose(gradient, weight, [True, False, False])
        if needs_weight or needs_bias:
            live = gradient[:, live_index]
            if _is_small_and_short(live) and stride == dilation == [1, 1]:
                to_weight = _weight_gradient(live, inputs, weight.shape[2:], padding)
                to_bias = live.sum((0, 2, 3)) if needs_bias else None
            else:
                rows = weight[: len(live_index)]  # only their shape is read
                _, to_weight, to_bias = transpose(live, rows, [False, needs_weight, needs_bias])
        return to_inputs, None, None, to_weight, to_bias, None, None


def _is_small_and_short(gradient: Tensor) -> bool:
    small = gradient.shape[2] * gradient.shape[3] <= _SMALL_MAP
    return small and gradient.dtype == torch.bfloat16 and gradient.device.type == "cpu"


def _weight_gradient(
    gradient: Tensor, inputs: Tensor, kernel: torch.Size, padding: list[int]
) -> Tensor:
    """Return the weight gradient of a convolution of stride 1 as one matrix product.

    Parameters
    ----------
    gradient : Tensor, shape (N, F, h, w)
        At the output.
    inputs : Tensor, shape (N, I, H, W)
        The layer's input.
    kernel : torch.Size
        (kH, kW).
    padding : list of int
        Of height and width.
    """
    padded = F.pad(inputs, [padding[1]] * 2 + [padding[0]] * 2).permute(0, 2, 3, 1)
    windows = padded.unfold(1, kernel[0], 1).unfold(2, kernel[1], 1)  # (N, h, w, I, kH, kW)
    # Channels last in memory, as in the inputs: copied in long pieces.
    columns = windows.movedim(3, 5).reshape(-1, kernel.numel() * inputs.shape[1])
    product = gradient.transpose(0, 1).flatten(1) @ columns
    return product.unflatten(1, (*kernel, -1)).permute(0, 3, 1, 2)


class PartlyFrozenNorm(torch.autograd.Function):
    """Batch normalisation in training of which some channels keep their statistics.

    A live channel is normalised by the batch's mean μ and variance σ², a frozen one by those that
    are given; either way the output is scale · x + shift.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        frozen: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Normalise (N, F, ...) and move the live channels' running statistics.

        Parameters
        ----------
        inputs : Tensor, shape (N, F, ...)
            The layer's input.
        weight, bias : Tensor, shape (F,)
            γ and β.
        frozen : Tensor of bool, shape (F,)
            Which channels keep their running statistics.
        running_mean, running_var : Tensor, shape (F,)
            Are changed in place where live.
        momentum, eps : float
            As in ``nn.BatchNorm2d``.
        """
        mean, var, moved_mean, moved_var = _statistics(inputs, running_mean, running_var, momentum)
        mean = torch.where(frozen, running_mean, mean)
        var = torch.where(frozen, running_var, var)
        running_mean.copy_(torch.where(frozen, running_mean, moved_mean))
        running_var.copy_(torch.where(frozen, running_var, moved_var))
        ctx.save_for_backward(inputs, weight, frozen, mean, (var + eps).rsqrt())
        ctx.eps = eps
        return F.batch_norm(inputs, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs, γ and β; frozen channels pass theirs on scaled."""
        (gradient,) = gradients
        inputs, weight, frozen, mean, deviation = ctx.saved_tensors
        # With a γ of zero the batch's formula gives a frozen channel no gradient.
        live_weight = torch.where(frozen, 0.0, weight)
        to_inputs, to_weight, to_bias = _aten.native_batch_norm_backward(
            gradient, inputs, live_weight, None, None, mean, deviation, True, ctx.eps,
            [ctx.needs_input_grad[0], True, True],
        )  # fmt: skip
        if to_inputs is not None:
            scale = torch.where(frozen, weight * deviation, 0.0)
            scale = scale.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 2))
            to_inputs = to_inputs.addcmul_(gradient, scale)
        return to_inputs, to_weight, to_bias, None, None, None, None, None


def _statistics(
    inputs: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a batch's mean and variance, and the running ones moved by them."""
    moved_mean, moved_var = running_mean.clone(), running_var.clone()
    if not torch.compiler.is_compiling():
        mean, var = torch.batch_norm_update_stats(inputs, moved_mean, moved_var, momentum)
        return mean, var, moved_mean, moved_var
    # The compiler loses what that function writes.
    dimensions = [0, *range(2, inputs.ndim)]
    var, mean = torch.var_mean(inputs.to(running_mean.dtype), dimensions, correction=0)
    count = inputs.numel() // inputs.shape[1]
    moved_mean = moved_mean.lerp(mean, momentum)
    moved_var = moved_var.lerp(var * count / max(1, count - 1), momentum)
    return mean, var, moved_mean, moved_var
