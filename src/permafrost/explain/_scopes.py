"""What every explanation needs: a model put in eval mode for the length of a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def explaining(model: nn.Module) -> Iterator[None]:
    """Eval mode and gradient recording; each module's own training flag is put back on leaving."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        # Flags are set one by one: `model.train(flag)` would flatten a mix of train and eval.
        for module, _ in flags:
            module.training = False
        with torch.enable_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
