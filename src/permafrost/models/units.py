"""Which norm belongs to which convolution, by data flow, and in what order they run."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, product

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from permafrost.models.scopes import evaluating

# Sides of the images, in pixels, that a network is tried with where none are given.
_SIDES = (32, 64, 28, 96, 128, 224, 299, 384, 512, 16, 8)


@dataclass
class Flow:
    """What a forward pass has shown.

    Attributes
    ----------
    runs : dict of str to int
        Convolutions by name, in the order in which they first ran, and how often they ran.
    norms : dict of str to list of str
        For each of them the names of the norms whose input was its output, in order.
    """

    runs: dict[str, int] = field(default_factory=dict)
    norms: dict[str, list[str]] = field(default_factory=dict)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises channels, in eval mode by statistics that it keeps.

    These are BatchNorm of every kind and what holds its statistics as buffers alone, such as
    torchvision's ``FrozenBatchNorm2d``.
    """
    if isinstance(module, _BatchNorm):
        return True
    kept = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return all(isinstance(values, Tensor) and values.ndim == 1 for values in kept)


def runs_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Return whether a module computes what its base class does: it has no own ``forward``."""
    return isinstance(module, base) and all(
        getattr(type(module), name, None) is getattr(base, name, None) and name not in vars(module)
        for name in ("forward", "_conv_forward")
    )


@contextmanager
def recording_flow(model: nn.Module) -> Iterator[Flow]:
    """Within the block, note which convolutions run and which norm takes the output of which.

    A norm belongs to a convolution if its input IS the convolution's output: the same memory, that
    nothing has written to in between.
    """
    flow = Flow()
    outputs: list[tuple[str, Tensor, int]] = []

    def ran(name: str, output: Tensor) -> None:
        flow.runs[name] = flow.runs.get(name, 0) + 1
        flow.norms.setdefault(name, [])
        outputs.append((name, output.detach(), output._version))

    def met(name: str, value: Tensor) -> None:
        for conv, output, version in reversed(outputs):
            if _is_same(value, output, version):
                if name not in flow.norms[conv]:
                    flow.norms[conv].append(name)
                return

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(lambda _m, _i, o, n=name: ran(n, o)))
        elif is_norm(module):
            handles.append(module.register_forward_pre_hook(lambda _m, i, n=name: met(n, i[0])))
    try:
        yield flow
    finally:
        for handle in handles:
            handle.remove()


def _is_same(value: Tensor, output: Tensor, version: int) -> bool:
    return (
        value.data_ptr() == output.data_ptr()
        and value.shape == output.shape
        and value._version == version
    )


def trace_flow(model: nn.Module, images: Tensor | None = None, *, training: bool = False) -> Flow:
    """Follow the data through a network, in eval mode.

    Parameters
    ----------
    model : nn.Module
        Network of images (N, C, H, W). It is left as it was; hooks on it that others have set
        behind its modules are not called.
    images : Tensor, shape (N, C, H, W), optional
        What to run it on. Without them it is tried on black images of usual sizes, one after the
        other, until all convolutions and norms have run or the network has come to its end.
    training : bool
        Follow what is done in training instead, such as auxiliary heads.

    Returns
    -------
    Flow

    Raises
    ------
    ValueError
        If no images are given and the network runs on none that were tried.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if images is not None or not convs:
        flow, error = _follow(model, images, training)
        if error is not None:
            raise error
        return flow
    first = next(iter(convs.values()))
    # The one registered first need not be the one that takes the image.
    channels = {conv.in_channels for conv in convs.values()} & {1, 3} or {first.in_channels}
    for colours, side in product(sorted(channels, reverse=True), _SIDES):
        # Not its `weight`: to compute a derived one may change the layer's state in training mode.
        like = next(chain(first.parameters(), first.buffers()))
        example = like.new_zeros(2, colours, side, side)
        flow, error = _follow(model, example, training)
        if error is None or flow.runs.keys() == convs.keys():
            return flow
    raise ValueError(
        "the network cannot be followed from convolution to norm: it runs on no black images of "
        f"{channels} channels and {min(_SIDES)} to {max(_SIDES)} pixels; pass images"
    )


def _follow(
    model: nn.Module, images: Tensor | None, training: bool
) -> tuple[Flow, Exception | None]:
    """Return what was seen, and how the network refused the images, which it may do in any way."""
    gpus = {parameter.get_device() for parameter in model.parameters() if parameter.is_cuda}
    with (
        evaluating(model),
        _without_hooks(model),
        torch.random.fork_rng(list(gpus)),
        torch.no_grad(),
        _in_training(model) if training else nullcontext(),
        recording_flow(model) as flow,
    ):
        try:
            if images is not None:
                model(images.clone())
        except Exception as error:
            return flow, error
    return flow, None


def conv_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the 2-D convolutions that answer in eval mode, in the order in which they first run.

    Parameters
    ----------
    model : nn.Module
        Network of images (N, C, H, W); it is run on black ones, as by :func:`trace_flow`.

    Returns
    -------
    dict of str to nn.Conv2d
        By qualified name, as in ``model.named_modules()``; a layer that is registered twice
        appears once. Of a network that runs on no images that were tried, all its convolutions in
        order of registration.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    try:
        order = trace_flow(model).runs
    except ValueError:
        return layers
    return {name: layers[name] for name in order}


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Within the block, all but the norms are in training mode; on leaving, buffers are as before.

    A norm in training mode would refuse single values.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for module in model.modules():
        module.training = not is_norm(module)
    try:
        yield
    finally:
        for buffer, values in before:
            buffer.copy_(values)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Within the block no module calls the forward hooks that it has now."""
    own = [(module, module._forward_hooks) for module in model.modules()]
    try:
        for module, _ in own:
            module._forward_hooks = OrderedDict()
        yield
    finally:
        for module, hooks in own:
            module._forward_hooks = hooks
