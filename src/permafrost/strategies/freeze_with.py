"""Frozen filters, the others held by a second method: the post's own proposal for later work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from permafrost.freezing import BatchNormFreeze
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
from permafrost.strategies.ewc import Ewc
from permafrost.strategies.freeze import FROZEN, Freeze
from permafrost.strategies.lwf import Lwf


@dataclass(frozen=True)
class FreezeWith(Strategy):
    """Freeze the best-ranked filters, and let another strategy hold the live ones.

    Attributes
    ----------
    freeze : Freeze
        Which filters are frozen.
    other : Strategy
        What is added to the objective; it has one phase.
    """

    freeze: Freeze
    other: Strategy

    companion: ClassVar[type[Strategy]]
    freezes_ranked: ClassVar[bool] = True

    @classmethod
    def defaults(cls) -> dict[str, float]:
        """Return the other strategy's."""
        return cls.companion.defaults()

    @classmethod
    def build(
        cls, head: Head, hyper: Mapping[str, float], masks: MaskSource, batch_norm: BatchNormFreeze
    ) -> Self:
        """Make both; the hyperparameters are the other strategy's."""
        freeze = Freeze.build(head, {}, masks, batch_norm)
        return cls(head, freeze, cls.companion.build(head, hyper, masks, batch_norm))

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Hold the filters frozen, then let the other strategy see the network."""
        with (
            self.freeze.while_learning(lesson, phase) as frozen,
            self.other.while_learning(lesson, phase) as guard,
        ):
            yield replace(guard, chosen=guard.chosen | frozen.chosen)

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Return what the other strategy keeps, and which filters are frozen."""
        frozen = {name: mask for name, mask in guard.chosen.items() if name.startswith(FROZEN)}
        return self.other.after_phase(lesson, phase, guard) | frozen

    def frozen(self, network: TaskNetwork, memory: Memory) -> dict[str, Tensor]:
        """Return the filters that are frozen."""
        return self.freeze.frozen(network, memory)


@strategy("freeze_ewc")
class FreezeEwc(FreezeWith):
    """Frozen filters, the others held by elastic weight consolidation."""

    companion: ClassVar[type[Strategy]] = Ewc
    knowledge = Ewc.knowledge
    hyper: ClassVar[dict[str, tuple[float, float]]] = Ewc.hyper


@strategy("freeze_lwf")
class FreezeLwf(FreezeWith):
    """Frozen filters, the others held by distillation."""

    companion: ClassVar[type[Strategy]] = Lwf
    knowledge = Lwf.knowledge
    hyper: ClassVar[dict[str, tuple[float, float]]] = Lwf.hyper
