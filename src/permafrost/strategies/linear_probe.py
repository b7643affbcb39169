"""Linear probe: every filter is frozen, only the head learns (Alain & Bengio 2017)."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from permafrost.explain import conv_layers
from permafrost.freezing import frozen_filters
from permafrost.models import TaskNetwork
from permafrost.strategies.base import Strategy


@dataclass(frozen=True)
class LinearProbe(Strategy):
    """Learn the next task on the first task's features."""

    name = "linear_probe"

    def while_learning(
        self, network: TaskNetwork, learned: int
    ) -> AbstractContextManager[nn.Module | None]:
        """Hold every filter frozen, with its BatchNorm."""
        del learned
        layers = conv_layers(network)
        masks = {
            name: torch.ones(layer.out_channels, dtype=torch.bool) for name, layer in layers.items()
        }
        return frozen_filters(network, masks, "full")
