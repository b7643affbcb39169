"""Freeze the best-ranked share of every layer's filters (Feenstra & Dow 2023)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from permafrost.freezing import BatchNormFreeze, frozen_filters
from permafrost.strategies.base import Guard, Lesson, MaskSource, Phase, Strategy


@dataclass(frozen=True)
class Freeze(Strategy):
    """Train the next task with some filters frozen.

    Before each further task the filters are ranked anew, by the task learned last, and the first
    share of that ranking is frozen; a filter that was frozen before may then move again.

    Attributes
    ----------
    masks : callable
        Given the network and the number of tasks learned, the filters to freeze.
    batch_norm : {"full", "affine", "none"}
        What is frozen of a frozen filter's BatchNorm.
    """

    masks: MaskSource
    batch_norm: BatchNormFreeze = "full"

    name: ClassVar[str] = "freeze"
    hyper: ClassVar[dict[str, tuple[float, float]]] = {"pct": (0, 1)}

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Hold the masks' filters frozen."""
        del phase
        masks = self.masks(lesson.network, lesson.learned)
        with frozen_filters(lesson.network, masks, self.batch_norm):
            yield Guard()
