"""The operations behind partly frozen layers: no gradient is computed that nothing needs.

Each gives what the plain layers give under autograd, up to rounding.
"""

from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


class LiveRowsConv2d(torch.autograd.Function):
    """A convolution whose weight gradient is computed for the live filters only."""

    @staticmethod
    def forward(
        ctx: Any,
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
        stride, padding, dilation = geometry
        ctx.save_for_backward(inputs, weight, live_weight, live_index)
        ctx.geometry, ctx.has_bias = geometry, live_bias is not None
        return torch.conv2d(inputs, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs and of the live rows."""
        (gradient,) = gradients
        inputs, weight, live_weight, live_index = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        to_inputs = to_weight = to_bias = None

        def transpose(output: Tensor, filters: Tensor, mask: list[bool]) -> Any:
            return _aten.convolution_backward(
                output, inputs, filters, [len(filters)], stride, padding, dilation, False, [0, 0],
                1, mask,
            )  # fmt: skip

        if ctx.needs_input_grad[0]:
            to_inputs, _, _ = transpose(gradient, weight, [True, False, False])
        if live_weight is not None:
            live = gradient.index_select(1, live_index)
            _, to_weight, to_bias = transpose(live, live_weight, [False, True, ctx.has_bias])
        return to_inputs, None, None, to_weight, to_bias, None, None


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
        """Normalise (N, F, H, W) and move the live channels' running statistics.

        Parameters
        ----------
        inputs : Tensor, shape (N, F, H, W)
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
        moved_mean, moved_var = running_mean.clone(), running_var.clone()
        mean, var = torch.batch_norm_update_stats(inputs, moved_mean, moved_var, momentum)
        mean = torch.where(frozen, running_mean, mean)
        var = torch.where(frozen, running_var, var)
        running_mean.copy_(torch.where(frozen, running_mean, moved_mean))
        running_var.copy_(torch.where(frozen, running_var, moved_var))
        deviation = (var + eps).rsqrt()
        scale = weight * deviation
        ctx.save_for_backward(inputs, weight, frozen, mean, deviation)
        ctx.eps = eps
        return torch.addcmul(_by_channel(bias - mean * scale), inputs, _by_channel(scale))

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
            to_inputs = to_inputs.addcmul_(gradient, _by_channel(scale))
        return to_inputs, to_weight, to_bias, None, None, None, None, None


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
