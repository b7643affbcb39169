"""Activations and attention maps that a loss can be made of: gradients flow through them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from permafrost.explain._scopes import explaining

_RELU: set[Callable[..., Any]] = {
    F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_,
    F.relu6, F.hardtanh, F.hardtanh_,
}  # fmt: skip


def activation_sizes(model: nn.Module, images: Tensor) -> dict[str, tuple[int, int]]:
    """Return height and width of what each convolution gives, in the order in which they run.

    Parameters
    ----------
    model : nn.Module
        Run in eval mode.
    images : Tensor, shape (N, 3, H, W)
        Any.
    """
    sizes: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            sizes[name] = (output.shape[2], output.shape[3])

        return hook

    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    handles = [module.register_forward_hook(note(name)) for name, module in convs.items()]
    try:
        with explaining(model), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def deepest_of_size(model: nn.Module, images: Tensor, least: int) -> str:
    """Name the convolution, of those with so many positions in each direction, that runs last.

    Where none has so many, it is the last of those with the most.
    """
    sizes = {name: min(size) for name, size in activation_sizes(model, images).items()}
    least = min(least, max(sizes.values()))
    return [name for name, size in sizes.items() if size >= least][-1]


def block_ends(model: nn.Module, images: Tensor) -> list[str]:
    """Name the last convolution of each size of maps, in the order in which they run.

    In a VGG network and in a ResNet of basic blocks these are the ends of its blocks; elsewhere the
    last of a size may be the first of the next block. Maps of one position are left out, unless
    there are no others.
    """
    last: dict[tuple[int, int], str] = {}
    for name, size in activation_sizes(model, images).items():
        last.pop(size, None)
        last[size] = name
    return [name for size, name in last.items() if size != (1, 1)] or list(last.values())


@contextmanager
def activations(model: nn.Module, convs: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, hold what convolutions gave: behind the norm, and the ReLU if one follows.

    Parameters
    ----------
    model : nn.Module
        Any; each of the convolutions runs once within the block.
    convs : mapping of str to str
        Convolution to the module whose output is its feature map, as
        :func:`permafrost.ranking.features.feature_layers` gives them.

    Yields
    ------
    dict of str to Tensor, shape (N, F, h, w)
        By convolution. Each has a graph, or is where one begins. What a network writes into a map
        later, such as a residual sum, is in it too.
    """
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not output.requires_grad:
                # A graph begins here; a copy, since what follows may be in place.
                output = output.requires_grad_().clone()
            found[name] = output
            return output

        return hook

    handles = [
        model.get_submodule(module).register_forward_hook(note(conv))
        for conv, module in convs.items()
    ]
    try:
        with _ReLUs(found):
            yield found
    finally:
        for handle in handles:
            handle.remove()


class _ReLUs(TorchFunctionMode):
    """Within the block, put what a ReLU makes of a feature map in its place."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function not in _RELU:
            return function(*args, **(kwargs or {}))
        given = args[0] if args else (kwargs or {}).get("input")
        names = [name for name, output in self.found.items() if output is given]
        result = function(*args, **(kwargs or {}))
        for name in names:
            self.found[name] = result
        return result


def attention(activation: Tensor, chosen: Tensor, order: Tensor | None = None) -> Tensor:
    """Return Grad-CAM's maps, with a graph through activations and weights alike.

    The map is ReLU(Σ_k α_k A_k), α_k the mean over positions of the chosen logit's gradient with
    respect to A_k (Selvaraju et al. 2017, equations 1 and 2).

    Parameters
    ----------
    activation : Tensor, shape (N, K, h, w)
        A, of which the logits were made.
    chosen : Tensor, shape (N,)
        The logit that is explained of each image.
    order : Tensor of int64, shape (K,), optional
        Which channel's α each channel gets, in a control; by default its own.

    Returns
    -------
    Tensor, shape (N, h, w)
        0 or more, of the layer's size, not rescaled.
    """
    (gradient,) = torch.autograd.grad(chosen.sum(), activation, create_graph=True)
    weights = gradient.mean((2, 3), keepdim=True)
    if order is not None:
        weights = weights.index_select(1, order)
    return (weights * activation).sum(1).relu()
