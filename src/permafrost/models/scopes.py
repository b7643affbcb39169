"""How a network is run to be explained, ranked or measured, for the length of a `with` block."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Float32Precision = Literal["ieee", "tf32"]

_BACKENDS: Any = torch.backends
# What says how float32 is multiplied, the more general before what inherits from it.
_SWITCHES = (
    _BACKENDS,
    _BACKENDS.cudnn,
    _BACKENDS.mkldnn,
    _BACKENDS.cuda.matmul,
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
    _BACKENDS.mkldnn.conv,
    _BACKENDS.mkldnn.matmul,
    _BACKENDS.mkldnn.rnn,
)


@contextmanager
def float32_as(precision: Float32Precision) -> Iterator[None]:
    """Multiply float32 numbers in one way on every backend, whatever the process's switches are.

    Within the block autocast is off as well; on leaving, all switches are as they were. PyTorch's
    older switches (``allow_tf32``, ``set_float32_matmul_precision``) set the newer ones, which
    alone decide; they are not touched, and to read them within the block may raise an error.

    Parameters
    ----------
    precision : {"ieee", "tf32"}
        ``ieee``: true float32. ``tf32``: as GPUs since Ampere shorten it, to 10 bits of mantissa.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        # What a process has not set follows the more general switch and is left alone.
        for switch in _SWITCHES:
            before = switch.fp32_precision
            if before != precision:
                stack.callback(setattr, switch, "fp32_precision", before)
                switch.fp32_precision = precision
        yield


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run a network in eval mode, in its own type, true float32 or longer, and as it is written.

    On leaving, each module has its own training flag again.

    Parameters
    ----------
    model : nn.Module
        Any network; a compiled one runs as if it were not.

    Raises
    ------
    ValueError
        If the network computes in a shorter type than float32, is not initialised, is TorchScript,
        or is run in inference mode.
    """
    with evaluating(model), float32_as("ieee"):
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if values.is_floating_point() and values.dtype.itemsize < 4:
                raise ValueError(
                    f"{name!r} is {str(values.dtype).removeprefix('torch.')}, too short to measure "
                    "or explain a network with; pass model.float()"
                )
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a network in eval mode and as it is written, in whatever type it computes.

    On leaving, each module has its own training flag again.

    Parameters
    ----------
    model : nn.Module
        Any network; a compiled one runs as if it were not.

    Raises
    ------
    ValueError
        If the network is not initialised, is TorchScript, or is run in inference mode.
    """
    _check(model)
    flags = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        # What is compiled calls no hook that was set later. Nothing is, unless this was imported.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            # Flags are set one by one: `model.train(flag)` would flatten a mix of train and eval.
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, flag in flags:
                module.training = flag


def _check(model: nn.Module) -> None:
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode is not supported here; leave it, or use no_grad")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("TorchScript networks are not supported; pass the network it was made of")
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(values):
            raise ValueError(f"{name!r} is not initialised; first run the network on its images")
