"""Frozen filters, the others held by a second method: the post's own proposal for later work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from permafrost.strategies.base import Guard, Lesson, Memory, Phase, Strategy
from permafrost.strategies.ewc import Ewc
from permafrost.strategies.freeze import Freeze
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

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Hold the filters frozen, then let the other strategy see the network."""
        with (
            self.freeze.while_learning(lesson, phase),
            self.other.while_learning(lesson, phase) as guard,
        ):
            yield guard

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Return what the other strategy keeps."""
        return self.other.after_phase(lesson, phase, guard)


class FreezeEwc(FreezeWith):
    """Frozen filters, the others held by elastic weight consolidation."""

    companion: ClassVar[type[Strategy]] = Ewc
    name: ClassVar[str] = "freeze_ewc"
    knowledge: ClassVar[str | None] = Ewc.knowledge
    hyper: ClassVar[dict[str, tuple[float, float]]] = Ewc.hyper


class FreezeLwf(FreezeWith):
    """Frozen filters, the others held by distillation."""

    companion: ClassVar[type[Strategy]] = Lwf
    name: ClassVar[str] = "freeze_lwf"
    knowledge: ClassVar[str | None] = Lwf.knowledge
    hyper: ClassVar[dict[str, tuple[float, float]]] = Lwf.hyper
