"""Layers whose frozen filters cannot move: an optimizer never sees them.

Zeroing a gradient does not freeze a weight: momentum, Adam's state and weight decay still move it.
Here the frozen rows are buffers and only the live rows are parameters, so that a frozen filter
stays the same bit for bit through any optimizer.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from permafrost.freezing.functions import LiveRowsConv2d, PartlyFrozenNorm, compute_dtype
from permafrost.freezing.holding import Held, Network, Part, Plan, Rows
from permafrost.models.units import runs_as

BatchNormFreeze = Literal["full", "affine", "none"]
BATCH_NORM_FREEZES: tuple[BatchNormFreeze, ...] = ("full", "affine", "none")


class PartlyFrozenRows(Rows):
    """A tensor of which only some rows are parameters.

    Parameters
    ----------
    rows : Tensor, shape (F, ...)
        Starting values; what does not require a gradient does not here.
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
        if self.live is not None:
            self.live.requires_grad_(rows.requires_grad)

    def forward(self) -> Tensor:
        """Return all F rows, the live ones in their places."""
        # A clone keeps the memory format, in which the network computes; index_copy would not.
        rows = self.initial.clone()
        return rows if self.live is None else rows.index_copy_(0, self.live_index, self.live)

    def fill(self, values: Tensor) -> None:
        """Take other values, frozen ones too."""
        self.initial = values.detach().clone()
        if self.live is not None:
            self.live.data = self.initial[self.live_index]


class HeldElements(Rows):
    """A tensor of which only some elements move.

    The optimizer moves a whole copy, of which the frozen elements are read by nothing.

    Parameters
    ----------
    values : Tensor
        Starting values; what does not require a gradient does not here.
    frozen : Tensor of bool, of a shape that broadcasts to theirs
        True where an element must not move.
    """

    initial: Tensor
    frozen: Tensor
    live: nn.Parameter

    def __init__(self, values: Tensor, frozen: Tensor) -> None:
        super().__init__()
        self.register_buffer("initial", values.detach().clone())
        if frozen.shape == values.shape:
            # In the values' own memory format, in which the network computes.
            frozen = torch.zeros_like(values, dtype=torch.bool).copy_(frozen)
        self.register_buffer("frozen", frozen)
        self.live = nn.Parameter(values.detach().clone(), values.requires_grad)

    def forward(self) -> Tensor:
        """Return all elements."""
        return torch.where(self.frozen, self.initial, self.live)

    def fill(self, values: Tensor) -> None:
        """Take other values, frozen ones too."""
        self.initial = values.detach().clone()
        self.live.data = values.detach().clone()


class PartlyFrozen(Held):
    """A layer that computes in its own way, by the whole weight and bias."""


class PartlyFrozenConv(Held):
    """A plain convolution, whose frozen filters take no part in the weight gradient."""

    weight_rows: PartlyFrozenRows
    bias_rows: PartlyFrozenRows | None

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve (N, I, H, W) to (N, F, h, w)."""
        conv: Any = self
        own_way = conv.padding_mode != "zeros" or conv.groups != 1 or isinstance(conv.padding, str)
        if own_way or inputs.ndim != 4:
            return super().forward(inputs)  # type: ignore[misc,no-any-return]
        weight, bias = self.weight_rows, self.bias_rows
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


class FrozenChannels(Part):
    """Which channels of a norm keep their statistics; no parameter.

    Parameters
    ----------
    name : str
        The norm's, for messages.
    frozen : Tensor of bool, shape (F,)
        True for each frozen channel.
    """

    frozen: Tensor

    def __init__(self, name: str, frozen: Tensor) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("frozen", frozen.clone())
        self.all_frozen = bool(frozen.all())

    def forward(
        self, norm: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None,
        momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        """Normalise in training, frozen channels by their frozen statistics."""
        if not self.all_frozen and inputs.numel() == inputs.shape[1]:
            raise ValueError("a BatchNorm in training needs more than one value per channel")
        mean, var = norm.running_mean, norm.running_var
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        result: Tensor = PartlyFrozenNorm.apply(
            inputs, weight, bias, self.frozen, mean, var, momentum, eps
        )  # type: ignore[no-untyped-call]
        return result


class PartlyFrozenBatchNorm(Held):
    """A plain BatchNorm of which some channels keep their statistics and are normalised by them."""

    frozen_channels: FrozenChannels

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise (N, F, ...)."""
        if not self.training:
            return super().forward(inputs)  # type: ignore[misc,no-any-return]
        norm: Any = self
        norm._check_input_dim(inputs)
        if not self.frozen_channels.all_frozen:
            norm.num_batches_tracked.add_(1)
        # Without a momentum PyTorch's running statistics are the plain average of all batches.
        momentum = norm.momentum
        if momentum is None:
            momentum = 1.0 / max(1.0, float(norm.num_batches_tracked))
        result: Tensor = self.frozen_channels(
            norm, inputs, norm.weight, norm.bias, momentum, norm.eps
        )
        return result


class PartlyFrozenCustomNorm(Held):
    """A norm with a ``forward`` of its own: in it, calls of ``batch_norm`` keep what is frozen."""

    frozen_channels: FrozenChannels

    def forward(self, *args: Any, **options: Any) -> Any:
        """Run the layer's own forward.

        Raises
        ------
        ValueError
            If it has normalised by the batch in another way; frozen statistics are put back.
        """
        if not self.training:
            return super().forward(*args, **options)  # type: ignore[misc]
        norm: Any = self
        statistics = (norm.running_mean, norm.running_var)
        before = [values.clone() for values in statistics]
        with _BatchNormCalls(norm) as calls:
            result = super().forward(*args, **options)  # type: ignore[misc]
        moved = not all(map(torch.equal, statistics, before))
        if not calls.seen and (moved or isinstance(norm, _BatchNorm)):
            for values, old in zip(statistics, before, strict=True):
                values.copy_(old)
            raise ValueError(
                f"{self.frozen_channels.name!r} ({self.plain_class.__name__}) does not normalise "
                "by torch's batch_norm, so no channel can keep its statistics; pass "
                'batch_norm="affine"'
            )
        return result


_BATCH_NORM = inspect.signature(F.batch_norm)


class _BatchNormCalls(TorchFunctionMode):
    """Within the block, answers calls of ``batch_norm`` by a norm's own running statistics."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm
        self.seen = False

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.batch_norm:
            call = _BATCH_NORM.bind(*args, **(kwargs or {}))
            call.apply_defaults()
            inputs, mean, _, weight, bias, training, momentum, eps = call.args
            if mean is self.norm.running_mean:
                self.seen = True
                if training:
                    return self.norm.frozen_channels(self.norm, inputs, weight, bias, momentum, eps)
        return function(*args, **(kwargs or {}))


def plan_conv(network: Network, conv: nn.Conv2d, frozen: Tensor) -> Plan:
    """Return how a convolution is held.

    Parameters
    ----------
    network : Network
        Of which it is a part.
    conv : nn.Conv2d
        Also with a ``forward`` of its own.
    frozen : Tensor of bool, shape (F,)
        True for each frozen filter.

    Raises
    ------
    ValueError
        If a frozen filter could move; see :func:`~permafrost.freezing.frozen_filters`.
    """
    rows = _rows(network, conv, frozen)
    _check_alone(network, conv)
    if runs_as(conv, nn.Conv2d) and isinstance(rows["weight"], PartlyFrozenRows):
        return Plan(conv, PartlyFrozenConv, rows, {} if "bias" in rows else {"bias_rows": None})
    return Plan(conv, PartlyFrozen, rows)


def plan_norm(
    network: Network, norm: Any, frozen: Tensor | None = None, *, statistics: bool = True
) -> Plan:
    """Return how a norm is held.

    Parameters
    ----------
    network : Network
        Of which it is a part.
    norm : nn.Module
        What :func:`permafrost.models.units.is_norm` says so of.
    frozen : Tensor of bool, shape (F,), optional
        True for each frozen channel; by default for all.
    statistics : bool
        True: a frozen channel keeps its running mean and variance and is normalised by them in
        training too. False: only γ and β are frozen.

    Raises
    ------
    ValueError
        If a frozen channel could move; see :func:`~permafrost.freezing.frozen_filters`.
    """
    name = network.names[norm]
    if statistics and (norm.running_mean is None or not getattr(norm, "track_running_stats", True)):
        raise ValueError(
            f"{name!r} is a norm without running statistics, which cannot be frozen; pass "
            'batch_norm="affine"'
        )
    if frozen is None:
        frozen = torch.ones_like(norm.running_mean, dtype=torch.bool)
    rows = _rows(network, norm, frozen)
    _check_alone(network, norm)
    if not statistics:
        return Plan(norm, PartlyFrozen, rows)
    if "forward" in vars(norm):
        raise ValueError(
            f"the forward of {name!r} was replaced on the object, so no channel can keep its "
            'statistics; pass batch_norm="affine"'
        )
    kind = PartlyFrozenBatchNorm if runs_as(norm, _BatchNorm) else PartlyFrozenCustomNorm
    return Plan(norm, kind, rows, {"frozen_channels": FrozenChannels(name, frozen)})


def _rows(network: Network, layer: nn.Module, frozen: Tensor) -> dict[str, Rows]:
    rows: dict[str, Rows] = {}
    for part in ("weight", "bias"):
        if network.check(layer, part):
            values = layer.get_parameter(part)
            if values.shape[:1] != frozen.shape:
                raise ValueError(
                    f"the {part} of {network.names[layer]!r} has no row for each of the "
                    f"{len(frozen)} filters, so that none can be frozen"
                )
            rows[part] = _held_rows(values, frozen)
    return rows


def _held_rows(values: nn.Parameter, frozen: Tensor) -> Rows:
    """Return rows in the form in which their device computes faster.

    A CPU saves the arithmetic of frozen rows. On a GPU to pick rows out and put them back takes
    longer than that arithmetic.
    """
    if frozen.all() or not _has_arithmetic_to_spare(values.device):
        return PartlyFrozenRows(values, frozen)
    return HeldElements(values, frozen.view(-1, *[1] * (values.ndim - 1)))


def _has_arithmetic_to_spare(device: torch.device) -> bool:
    return device.type == "cuda"


def _check_alone(network: Network, layer: nn.Module) -> None:
    """Check that nothing else of a layer moves its filters."""
    for name, value in layer.named_parameters(recurse=isinstance(layer, nn.Conv2d)):
        if name not in ("weight", "bias") and value.requires_grad:
            raise ValueError(
                f"{network.names[layer]!r} ({type(layer).__name__}) has a parameter {name!r} too, "
                "which would move its frozen filters; call requires_grad_(False) on it"
            )
