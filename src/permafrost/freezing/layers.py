"""Layers whose frozen filters cannot move: an optimizer never sees them.

Zeroing a gradient does not freeze a weight: momentum, Adam's state and weight decay still move it.
Here the frozen rows are buffers and only the live rows are parameters, so that a frozen filter
stays the same bit for bit through any optimizer.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BatchNormFreeze = Literal["full", "affine", "none"]
BATCH_NORM_FREEZES: tuple[BatchNormFreeze, ...] = ("full", "affine", "none")


class PartlyFrozenRows(nn.Module):
    """A tensor of which only some rows are parameters.

    Parameters
    ----------
    rows : Tensor, shape (F, ...)
        Starting values.
    frozen : Tensor of bool, shape (F,)
        True where a row must not move.
    """

    initial: Tensor
    live_index: Tensor

    def __init__(self, rows: Tensor, frozen: Tensor) -> None:
        super().__init__()
        live = (~frozen).nonzero().flatten()
        self.register_buffer("initial", rows.detach().clone())
        self.register_buffer("live_index", live)
        # An empty parameter would only burden the optimizer.
        self.live = nn.Parameter(rows.detach()[live].clone()) if len(live) else None

    def forward(self) -> Tensor:
        """Return all F rows, the live ones in their places."""
        if self.live is None:
            return self.initial
        return self.initial.index_copy(0, self.live_index, self.live)


class PartlyFrozenConv2d(nn.Module):
    """A convolution of which some filters (weight rows and biases) are frozen.

    Parameters
    ----------
    conv : nn.Conv2d
        The layer to stand in for; it is not changed until :meth:`write_back`.
    frozen : Tensor of bool, shape (F,)
        True for each frozen filter.
    """

    def __init__(self, conv: nn.Conv2d, frozen: Tensor) -> None:
        super().__init__()
        # In a tuple, so that the original's parameters are not registered here.
        self._original = (conv,)
        self.weight_rows = PartlyFrozenRows(conv.weight, frozen)
        self.bias_rows = None if conv.bias is None else PartlyFrozenRows(conv.bias, frozen)

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve (N, I, H, W) to (N, F, h, w)."""
        bias = None if self.bias_rows is None else self.bias_rows()
        (conv,) = self._original
        return conv._conv_forward(inputs, self.weight_rows(), bias)

    @torch.no_grad()
    def write_back(self) -> nn.Conv2d:
        """Copy the live rows into the original layer and return it."""
        (conv,) = self._original
        conv.weight.copy_(self.weight_rows())
        if conv.bias is not None and self.bias_rows is not None:
            conv.bias.copy_(self.bias_rows())
        return conv


class PartlyFrozenBatchNorm2d(nn.Module):
    """A BatchNorm of which some channels are frozen.

    Parameters
    ----------
    norm : nn.BatchNorm2d
        The layer to stand in for; it is not changed until :meth:`write_back`.
    frozen : Tensor of bool, shape (F,)
        True for each frozen channel.
    statistics : bool
        True: a frozen channel keeps its running mean and variance and is normalised by them in
        training too. False: only γ and β are frozen.
    """

    frozen: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm2d, frozen: Tensor, *, statistics: bool) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("a BatchNorm without running statistics cannot be frozen")
        assert norm.num_batches_tracked is not None
        self._original = (norm,)
        self.statistics = statistics
        self.register_buffer("frozen", frozen.clone())
        self.register_buffer("running_mean", norm.running_mean.clone())
        self.register_buffer("running_var", norm.running_var.clone())
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked.clone())
        self.weight_rows = PartlyFrozenRows(norm.weight, frozen) if norm.affine else None
        self.bias_rows = PartlyFrozenRows(norm.bias, frozen) if norm.affine else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise (N, F, H, W); frozen channels by their frozen statistics."""
        (norm,) = self._original
        weight, bias = self._affine()
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(inputs, mean, var, weight, bias, eps=norm.eps)
        if not self.statistics:
            return self._normalise_by_batch(inputs, weight, bias)
        # By its frozen statistics a channel is scale * input + shift. It goes through the batch
        # normalisation with a weight of zero, so that neither its output nor its gradient sees the
        # batch's statistics: one pass more instead of two normalisations and a choice.
        scale = weight.detach() * (self.running_var + norm.eps).rsqrt()
        shift = bias.detach() - self.running_mean * scale
        zero = torch.zeros_like(scale)
        output = self._normalise_by_batch(
            inputs,
            torch.where(self.frozen, zero, weight),
            torch.where(self.frozen, shift, bias),
        )
        scale = torch.where(self.frozen, scale, zero)
        return torch.addcmul(output, inputs, scale[:, None, None])

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Return γ and β."""
        if self.weight_rows is None or self.bias_rows is None:
            return torch.ones_like(self.running_mean), torch.zeros_like(self.running_mean)
        return self.weight_rows(), self.bias_rows()

    def _normalise_by_batch(self, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalise by the batch's statistics, which also move the live running ones."""
        (norm,) = self._original
        if not (self.statistics and bool(self.frozen.all())):
            self.num_batches_tracked.add_(1)
        # Without a momentum PyTorch's running statistics are the plain average of all batches.
        momentum = norm.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        mean, var = self.running_mean.clone(), self.running_var.clone()
        output = F.batch_norm(inputs, mean, var, weight, bias, True, momentum, norm.eps)
        held = self.frozen if self.statistics else torch.zeros_like(self.frozen)
        self.running_mean.copy_(torch.where(held, self.running_mean, mean))
        self.running_var.copy_(torch.where(held, self.running_var, var))
        return output

    @torch.no_grad()
    def write_back(self) -> nn.BatchNorm2d:
        """Copy the live channels' values into the original layer and return it."""
        (norm,) = self._original
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.running_mean.copy_(self.running_mean)
        norm.running_var.copy_(self.running_var)
        norm.num_batches_tracked.copy_(self.num_batches_tracked)
        if self.weight_rows is not None and self.bias_rows is not None:
            norm.weight.copy_(self.weight_rows())
            norm.bias.copy_(self.bias_rows())
        return norm
