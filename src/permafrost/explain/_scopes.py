"""What every explanation needs of a model, for the length of a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from permafrost.models.scopes import measuring


@contextmanager
def explaining(model: nn.Module) -> Iterator[None]:
    """Within the block the model is measured (see `measuring`) and gradients are recorded."""
    with measuring(model), torch.enable_grad():
        yield
