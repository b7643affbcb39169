"""Layers whose frozen filters cannot move: an optimizer never sees them.

Zeroing a gradient does not freeze a weight: momentum, Adam's state and weight decay still move it.
Here the frozen rows are buffers and only the live rows are parameters, so that a frozen filter
stays the same bit for bit through any optimizer.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.freezing.functions import LiveRowsConv2d, PartlyFrozenNorm, compute_dtype

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
        # A clone keeps the memory format, in which the network computes; index_copy would not.
        return self.initial.clone().index_copy_(0, self.live_index, self.live)


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
        weight, bias = self.weight_rows, self.bias_rows
        (conv,) = self._original
        if conv.padding_mode != "zeros" or conv.groups != 1 or isinstance(conv.padding, str):
            return conv._conv_forward(inputs, weight(), None if bias is None else bias())
        dtype = compute_dtype(inputs)
        with torch.no_grad():
            all_weights = weight().to(dtype)
            all_biases = None if bias is None else bias().to(dtype)
        result: Tensor = LiveRowsConv2d.apply(
            inputs.to(dtype),
            all_weights,
            all_biases,
            weight.live,
            None if bias is None else bias.live,
            weight.live_index,
            (list(conv.stride), list(conv.padding), list(conv.dilation)),
        )  # type: ignore[no-untyped-call]
        return result

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
        held = self.frozen if self.statistics else torch.zeros_like(self.frozen)
        if not bool(held.all()):
            if inputs.numel() == inputs.shape[1]:
                raise ValueError("a BatchNorm in training needs more than one value per channel")
            self.num_batches_tracked.add_(1)
        # Without a momentum PyTorch's running statistics are the plain average of all batches.
        momentum = norm.momentum
        if momentum is None:
            momentum = 1.0 / max(1.0, float(self.num_batches_tracked))
        if not self.statistics:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(inputs, mean, var, weight, bias, True, momentum, norm.eps)
        result: Tensor = PartlyFrozenNorm.apply(
            inputs, weight, bias, held, self.running_mean, self.running_var, momentum, norm.eps
        )  # type: ignore[no-untyped-call]
        return result

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Return γ and β."""
        if self.weight_rows is None or self.bias_rows is None:
            return torch.ones_like(self.running_mean), torch.zeros_like(self.running_mean)
        return self.weight_rows(), self.bias_rows()

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


class HeldElements(nn.Module):
    """A tensor of which only some elements move.

    Parameters
    ----------
    values : Tensor
        Starting values.
    frozen : Tensor of bool, of the same shape
        True where an element must not move.
    """

    initial: Tensor
    frozen: Tensor

    def __init__(self, values: Tensor, frozen: Tensor) -> None:
        super().__init__()
        self.register_buffer("initial", values.detach().clone())
        # In the values' own memory format, in which the network computes.
        marked = torch.zeros_like(values, dtype=torch.bool).copy_(frozen)
        self.register_buffer("frozen", marked)
        self.moving = nn.Parameter(values.detach().clone())

    def forward(self) -> Tensor:
        """Return all elements."""
        return torch.where(self.frozen, self.initial, self.moving)


class HeldLayer(nn.Module):
    """A convolution or linear layer of which single weights are frozen.

    Parameters
    ----------
    layer : nn.Conv2d or nn.Linear
        The layer to stand in for; it is not changed until :meth:`write_back`.
    frozen : dict of str to Tensor of bool
        For ``weight`` and ``bias``, of their shapes, True for each frozen element.

    Raises
    ------
    ValueError
        If the layer is of another kind.
    """

    def __init__(self, layer: nn.Module, frozen: dict[str, Tensor]) -> None:
        super().__init__()
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise ValueError(f"single weights of a {type(layer).__name__} cannot be frozen")
        self._original = (layer,)
        self.weight_rows = _hold(layer.weight, frozen.get("weight"))
        self.bias_rows = None if layer.bias is None else _hold(layer.bias, frozen.get("bias"))

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer."""
        (layer,) = self._original
        weight, bias = self.weight_rows(), None if self.bias_rows is None else self.bias_rows()
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(inputs, weight, bias)
        return F.linear(inputs, weight, bias)

    @torch.no_grad()
    def write_back(self) -> nn.Conv2d | nn.Linear:
        """Copy what was learned into the original layer and return it."""
        (layer,) = self._original
        layer.weight.copy_(self.weight_rows())
        if layer.bias is not None and self.bias_rows is not None:
            layer.bias.copy_(self.bias_rows())
        return layer


def _hold(values: Tensor, frozen: Tensor | None) -> HeldElements:
    nothing = torch.zeros_like(values, dtype=torch.bool)
    return HeldElements(values, nothing if frozen is None else frozen)
