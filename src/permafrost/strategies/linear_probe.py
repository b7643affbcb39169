"""Linear probe: every filter is frozen, only the head learns (Alain & Bengio 2017)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from permafrost.explain import conv_layers
from permafrost.freezing import frozen_filters
from permafrost.models import TaskNetwork
from permafrost.strategies.base import Guard, Lesson, Memory, Phase, Strategy, strategy


@strategy("linear_probe")
@dataclass(frozen=True)
class LinearProbe(Strategy):
    """Learn the next task on the first task's features."""

    step_cost: ClassVar[float] = 0.3  # nothing flows back through the body

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Hold every filter frozen, with its BatchNorm, and whatever else the body learns by."""
        del phase
        with frozen_filters(lesson.network, self.frozen(lesson.network, {})):
            rest = [p for p in lesson.network.features.parameters() if p.requires_grad]
            for parameter in rest:
                parameter.requires_grad_(False)
            try:
                yield Guard()
            finally:
                for parameter in rest:
                    parameter.requires_grad_(True)

    def frozen(self, network: TaskNetwork, memory: Memory) -> dict[str, Tensor]:
        """Return all filters."""
        del memory
        layers = conv_layers(network).items()
        return {name: torch.ones(layer.out_channels, dtype=torch.bool) for name, layer in layers}
