"""Frozen filters: the best-ranked share of every layer (Feenstra & Dow 2023), and their base."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import Tensor

from permafrost.freezing import BatchNormFreeze, FilterMasks, frozen_filters
from permafrost.hyper import Allowed, Value
from permafrost.models import Head, TaskNetwork
from permafrost.strategies.base import (
    FilterRanking,
    Guard,
    Lesson,
    MaskSource,
    Memory,
    Phase,
    Strategy,
    part_with,
    strategy,
)
from permafrost.training import part_of

FROZEN = "frozen/"


@dataclass(frozen=True)
class FreezesFilters(Strategy):
    """Train the next task with some filters frozen, which are never released.

    Attributes
    ----------
    batch_norm : {"full", "affine", "none"}
        What is frozen of a frozen filter's BatchNorm.
    """

    batch_norm: BatchNormFreeze = field(default="full", kw_only=True)

    def choose(self, lesson: Lesson) -> FilterMasks:
        """Return the filters to freeze; those that are frozen already are, named or not."""
        raise NotImplementedError

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Hold the chosen filters frozen, and all that were frozen before."""
        del phase
        masks = dict(self.choose(lesson))
        for name, before in self.frozen(lesson.network, lesson.memory).items():
            masks[name] = masks[name].cpu() | before if name in masks else before
        with frozen_filters(lesson.network, masks, self.batch_norm):
            yield Guard(chosen={f"{FROZEN}{name}": mask.cpu() for name, mask in masks.items()})

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Note which filters are frozen now."""
        del phase
        return lesson.memory | part_with(guard.chosen, FROZEN)

    def frozen(self, network: TaskNetwork, memory: Memory) -> dict[str, Tensor]:
        """Return the filters that are frozen."""
        del network
        return part_of(memory, FROZEN)


@strategy("freeze")
@dataclass(frozen=True)
class Freeze(FreezesFilters):
    """Freeze the best-ranked share of every layer.

    Before each further task the filters are ranked by the task learned last, and the first share of
    those still free joins the frozen ones. A layer without a free filter stays as it is.

    Attributes
    ----------
    masks : callable
        Given the lesson and the filters that are frozen already, which are to be frozen.
    """

    masks: MaskSource

    hyper: ClassVar[dict[str, Allowed]] = {"pct": (0, 1)}
    freezes_ranked: ClassVar[bool] = True
    twins: ClassVar[tuple[str, ...]] = ("chance",)

    @classmethod
    def defaults(cls) -> dict[str, Value]:
        """Return the default share."""
        return {"pct": 0.5}

    @classmethod
    def build(
        cls,
        head: Head,
        hyper: Mapping[str, Value],
        masks: FilterRanking,
        batch_norm: BatchNormFreeze,
    ) -> Self:
        """Make the strategy; the share lies in the masks."""
        del hyper
        return cls(head, masks, batch_norm=batch_norm)

    def choose(self, lesson: Lesson) -> FilterMasks:
        """Return what the masks say."""
        return self.masks(lesson, self.frozen(lesson.network, lesson.memory))
