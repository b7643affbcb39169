"""What protects filters, and beside it what holds the rest: two strategies at once.

The post proposes the first of them, frozen filters with a second method, for later work.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from permafrost.freezing import BatchNormFreeze
from permafrost.hyper import Allowed, Value
from permafrost.models import Head, TaskNetwork
from permafrost.strategies.base import (
    FilterRanking,
    Guard,
    Lesson,
    Memory,
    Phase,
    Strategy,
    strategy,
)
from permafrost.strategies.circuit import Circuit
from permafrost.strategies.ewc import Ewc
from permafrost.strategies.freeze import Freeze
from permafrost.strategies.lwf import Lwf
from permafrost.strategies.soft import Soft


@dataclass(frozen=True)
class Composed(Strategy):
    """Protect what one strategy says, and let another one add to the objective.

    The first decides about the phases, what is trained and which network answers; the second sees
    the phases in which the next task is learned.

    Attributes
    ----------
    protection, companion : Strategy
        The second has one phase and no observer.
    """

    protection: Strategy
    companion: Strategy

    made_of: ClassVar[tuple[type[Strategy], type[Strategy]]]

    @classmethod
    def defaults(cls) -> dict[str, Value]:
        """Return those of both."""
        known = cls.made_of[0].defaults() | cls.made_of[1].defaults()
        return {name: value for name, value in known.items() if name in cls.hyper}

    @classmethod
    def controls(cls, hyper: Mapping[str, Value]) -> tuple[str, ...]:
        """Return the protection's."""
        return cls.made_of[0].controls(hyper)

    @classmethod
    def build(
        cls,
        head: Head,
        hyper: Mapping[str, Value],
        masks: FilterRanking,
        batch_norm: BatchNormFreeze,
    ) -> Self:
        """Make both, of the hyperparameters that each has."""
        parts = [
            made.build(
                head,
                {name: value for name, value in hyper.items() if name in made.hyper},
                masks,
                batch_norm,
            )
            for made in cls.made_of
        ]
        return cls(head, *parts)

    @classmethod
    def built_of(cls) -> set[str]:
        """Return what either is built of."""
        return {name for made in cls.made_of for name in made.built_of()}

    def as_twin(self, twin: str) -> Self:
        """Return the control of the protection, beside the same companion."""
        return replace(self, twin=twin, protection=self.protection.as_twin(twin))

    def phases(self, lesson: Lesson) -> list[Phase]:
        """Return the protection's."""
        return self.protection.phases(lesson)

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Protect, then let the companion see the network."""
        with self.protection.while_learning(lesson, phase) as guard:
            if phase.task != lesson.learned:
                yield guard
                return
            with self.companion.while_learning(lesson, phase) as beside:
                chosen = beside.chosen | guard.chosen
                yield replace(beside, observer=guard.observer, chosen=chosen)

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Return what both keep."""
        kept = self.protection.after_phase(lesson, phase, guard)
        if phase.task != lesson.learned:
            return kept
        beside = self.companion.after_phase(lesson, phase, guard)
        # Not what it only passes on: that may be newer among what the protection keeps.
        return kept | {n: v for n, v in beside.items() if v is not lesson.memory.get(n)}

    def measured(self, lesson: Lesson, phase: Phase) -> Collection[int]:
        """Return the protection's."""
        return self.protection.measured(lesson, phase)

    def network_for(self, network: TaskNetwork, task: int, memory: Memory) -> TaskNetwork:
        """Return the protection's."""
        return self.protection.network_for(network, task, memory)

    @classmethod
    def needs_memory(cls) -> bool:
        """Return whether the protection does."""
        return cls.made_of[0].needs_memory()

    def frozen(self, network: TaskNetwork, memory: Memory) -> dict[str, Tensor]:
        """Return the filters that the protection has frozen."""
        return self.protection.frozen(network, memory)


@strategy("freeze_ewc")
class FreezeEwc(Composed):
    """Frozen filters, the others held by elastic weight consolidation."""

    made_of: ClassVar[tuple[type[Strategy], type[Strategy]]] = (Freeze, Ewc)
    knowledge = Ewc.knowledge
    hyper: ClassVar[dict[str, Allowed]] = Ewc.hyper
    freezes_ranked: ClassVar[bool] = True


@strategy("freeze_lwf")
class FreezeLwf(Composed):
    """Frozen filters, the others held by distillation."""

    made_of: ClassVar[tuple[type[Strategy], type[Strategy]]] = (Freeze, Lwf)
    knowledge = Lwf.knowledge
    hyper: ClassVar[dict[str, Allowed]] = Lwf.hyper
    freezes_ranked: ClassVar[bool] = True


@strategy("circuit_lwf")
class CircuitLwf(Composed):
    """A circuit, and distillation for the whole network."""

    made_of: ClassVar[tuple[type[Strategy], type[Strategy]]] = (Circuit, Lwf)
    knowledge = Lwf.knowledge
    hyper: ClassVar[dict[str, Allowed]] = Circuit.hyper | Lwf.hyper
    ranks: ClassVar[bool] = True
    remark: ClassVar[str] = Circuit.remark
    twins: ClassVar[tuple[str, ...]] = Circuit.twins


@strategy("soft_lwf")
class SoftLwf(Composed):
    """Weights slowed by their filters' importance, and distillation."""

    made_of: ClassVar[tuple[type[Strategy], type[Strategy]]] = (Soft, Lwf)
    knowledge = Lwf.knowledge
    hyper: ClassVar[dict[str, Allowed]] = Soft.hyper | Lwf.hyper
    ranks: ClassVar[bool] = True
    twins: ClassVar[tuple[str, ...]] = Soft.twins
