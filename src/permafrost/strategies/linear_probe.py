"""Linear probe: every filter is frozen, only the head learns (Alain & Bengio 2017)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from permafrost.explain import conv_layers
from permafrost.freezing import frozen_filters
from permafrost.strategies.base import Guard, Lesson, Phase, Strategy


@dataclass(frozen=True)
class LinearProbe(Strategy):
    """Learn the next task on the first task's features."""

    name: ClassVar[str] = "linear_probe"

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Hold every filter frozen, with its BatchNorm."""
        del phase
        layers = conv_layers(lesson.network)
        masks = {
            name: torch.ones(layer.out_channels, dtype=torch.bool) for name, layer in layers.items()
        }
        with frozen_filters(lesson.network, masks):
            yield Guard()
