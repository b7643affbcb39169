"""How a network is run to be explained, ranked or measured, for the length of a `with` block."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run a network in eval mode and as it is written, also where it is compiled.

    On leaving, each module has its own training flag again.

    Parameters
    ----------
    model : nn.Module
        Any network.
    """
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
