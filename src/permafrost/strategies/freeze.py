"""Freeze the best-ranked share of every layer's filters (Feenstra & Dow 2023)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from permafrost.freezing import BatchNormFreeze, frozen_filters
from permafrost.models import Head, TaskNetwork
from permafrost.strategies.base import (
    Guard,
    Lesson,
    MaskSource,
    Memory,
    Phase,
    Strategy,
    strategy,
)
from permafrost.training import part_of

FROZEN = "frozen/"


@strategy("freeze")
@dataclass(frozen=True)
class Freeze(Strategy):
    """Train the next task with some filters frozen.

    Before each further task the filters are ranked by the task learned last, and the first share of
    those still free joins the frozen ones, which are never released. A layer without a free filter
    stays as it is.

    Attributes
    ----------
    masks : callable
        Given the lesson and the filters that are frozen already, which are to be frozen.
    batch_norm : {"full", "affine", "none"}
        What is frozen of a frozen filter's BatchNorm.
    """

    masks: MaskSource
    batch_norm: BatchNormFreeze = "full"

    hyper: ClassVar[dict[str, tuple[float, float]]] = {"pct": (0, 1)}
    freezes_ranked: ClassVar[bool] = True

    @classmethod
    def defaults(cls) -> dict[str, float]:
        """Return the default share."""
        return {"pct": 0.5}

    @classmethod
    def build(
        cls, head: Head, hyper: Mapping[str, float], masks: MaskSource, batch_norm: BatchNormFreeze
    ) -> Self:
        """Make the strategy; the share lies in the masks."""
        del hyper
        return cls(head, masks, batch_norm)

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Hold the masks' filters frozen, and all that were frozen before."""
        del phase
        masks = dict(self.masks(lesson, self.frozen(lesson.network, lesson.memory)))
        for name, before in self.frozen(lesson.network, lesson.memory).items():
            masks[name] = masks[name].cpu() | before if name in masks else before
        with frozen_filters(lesson.network, masks, self.batch_norm):
            yield Guard(chosen={f"{FROZEN}{name}": mask.cpu() for name, mask in masks.items()})

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Note which filters are frozen now."""
        del phase
        return lesson.memory | guard.chosen

    def frozen(self, network: TaskNetwork, memory: Memory) -> dict[str, Tensor]:
        """Return the filters that are frozen."""
        del network
        return part_of(memory, FROZEN)
