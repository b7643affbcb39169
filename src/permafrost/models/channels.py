"""Which filters a convolution reads, and which share their channels: followed through a network."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from permafrost.models.units import is_norm

# What leaves every channel where it is.
_CHANNELWISE: set[Any] = {
    F.relu, torch.relu, torch.relu_, F.relu6, F.hardtanh, F.silu, F.gelu, F.leaky_relu, F.dropout,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.flatten,
    "relu", "relu_", "flatten", "contiguous", "mean", "clone",
}  # fmt: skip
_CHANNELWISE_LAYERS = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Dropout, nn.Dropout2d,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Flatten,
)  # fmt: skip
_SUMS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass
class Channels:
    """Which group of channels each layer reads and gives.

    A group is named by the first convolution that gives it; convolutions whose outputs are added,
    and a depthwise convolution and what it reads, share one.

    Attributes
    ----------
    reads : dict of str to str or None
        By convolution; None is the image.
    gives : dict of str to str
        By convolution, in the order in which they run.
    norms : dict of str to str
        By norm.
    widths : dict of str to int
        Channels of each group.
    features : str
        What the body gives.
    """

    reads: dict[str, str | None] = field(default_factory=dict)
    gives: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    features: str = ""

    def join(self, one: str, other: str) -> str:
        """Make one group of two; return its name."""
        if one != other:
            if self.widths.pop(other) != self.widths[one]:
                raise ValueError(f"{one} and {other} have other numbers of filters")
            for known in (self.reads, self.gives, self.norms):
                for name, group in known.items():
                    if group == other:
                        known[name] = one  # type: ignore[index]
        return one


def trace_channels(body: nn.Module, prefix: str = "") -> Channels:
    """Follow the channels through a network of convolutions, norms, activations and sums.

    Parameters
    ----------
    body : nn.Module
        Maps images to feature maps, or to one number for each of their channels.
    prefix : str
        Put before the layers' names.

    Raises
    ------
    ValueError
        If the network has another layer with weights, joins or splits channels, runs a layer
        twice, or cannot be traced.
    """
    try:
        graph = fx.Tracer().trace(body)
    except Exception as error:  # a network of one's own may refuse in any way
        raise ValueError(f"its channels cannot be followed: {error}") from None
    found, groups = Channels(), dict[fx.Node, str | None]()

    def of(node: Any) -> str | None:
        group = groups[node]
        while group is not None and group not in found.widths:  # joined since
            group = found.gives[group]
        return group

    for node in graph.nodes:
        if node.op == "placeholder":
            groups[node] = None
        elif node.op == "output":
            result = of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            if result is None:
                raise ValueError("its channels cannot be followed to the end of its body")
            found.features = result
        elif node.op == "call_module":
            layer = body.get_submodule(str(node.target))
            groups[node] = _through(found, f"{prefix}{node.target}", layer, of(node.args[0]))
        else:
            groups[node] = _combined(found, node, of)
    return found


def _through(found: Channels, name: str, layer: nn.Module, group: str | None) -> str | None:
    if name in found.gives or name in found.norms:
        raise ValueError(f"{name} runs twice, so that its filters have no one place")
    if isinstance(layer, nn.Conv2d):
        found.reads[name], found.gives[name] = group, name
        found.widths[name] = layer.out_channels
        if group is not None and layer.groups == layer.in_channels == layer.out_channels:
            return found.join(group, name)
        return name
    if is_norm(layer) and group is not None and getattr(layer, "weight", None) is not None:
        found.norms[name] = group
        return group
    if isinstance(layer, _CHANNELWISE_LAYERS):
        return group
    raise ValueError(f"channels are not followed through {name}, a {type(layer).__name__}")


def _combined(found: Channels, node: fx.Node, of: Callable[[Any], str | None]) -> str | None:
    inputs = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if node.target in _CHANNELWISE and len(inputs) == 1:
        return of(inputs[0])
    groups = [of(argument) for argument in inputs]
    if node.target in _SUMS and len(groups) == 2 and None not in groups:
        one, other = sorted(map(str, groups), key=list(found.gives).index)
        return found.join(one, other)
    raise ValueError(f"channels are not followed through {node.name}")


def read_by(conv: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return for each filter and weight what belongs to the channel that it reads.

    Parameters
    ----------
    conv : nn.Conv2d
        Of weight (F, I, h, w), grouped or not.
    inputs : Tensor, shape (channels,)
        Of each channel of its input.

    Returns
    -------
    Tensor, shape (F, I)
    """
    by_group = inputs.view(conv.groups, -1)
    return by_group.repeat_interleave(conv.out_channels // conv.groups, dim=0)
