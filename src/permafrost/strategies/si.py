"""Synaptic Intelligence (Zenke, Poole & Ganguli 2017)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from permafrost.hyper import Allowed
from permafrost.strategies.base import Guard, Lesson, Memory, Phase, Strategy, strategy
from permafrost.strategies.path_integral import INTEGRAL, PathIntegral
from permafrost.strategies.quadratic import PRECISION, common_parameters, penalised, remember
from permafrost.training import part_of

XI = 0.1


def integral_memory(lesson: Lesson) -> Memory:
    """Return the importance of the first task's weights, of the ω that its training recorded.

    Parameters
    ----------
    lesson : Lesson
        ``memory`` holds ω, its names preceded by ``INTEGRAL``; ``start`` the initial weights.
    """
    end = _watched(lesson)
    return remember(importance(part_of(lesson.memory, INTEGRAL), lesson.start, end), end)


def _watched(lesson: Lesson) -> dict[str, nn.Parameter]:
    """Return the parameters that the task learned now will hold while the next one is learned."""
    return common_parameters(lesson.network, lesson.head, lesson.learned + 1)


@torch.no_grad()
def importance(
    integral: Mapping[str, Tensor], start: Mapping[str, Tensor], end: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return max(0, ω) / (Δ² + ξ) of one task, of each parameter's shape, >= 0."""
    return {
        name: omega.clamp(min=0) / ((end[name] - start[name].to(end[name].device)).square() + XI)
        for name, omega in integral.items()
    }


@strategy("si")
@dataclass(frozen=True)
class Si(Strategy):
    """Hold the weights near the last task's, each by how much its moves have helped so far.

    Minimises L(θ) + c Σ_i Ω_i (θ_i − θ*_i)² with Ω_i = Σ_k max(0, ω_{k,i}) / (Δ_{k,i}² + ξ), ξ 0.1
    (equations 4 and 5); Δ_k is how far the weight moved over task k. ω is recorded with the
    gradient of the loss alone. Held are all parameters that the next task uses too
    (:func:`common_parameters`): a shared head is, an old task's own head is not. BatchNorm's
    running statistics drift.

    Attributes
    ----------
    strength : float
        c.
    """

    strength: float = 1.0

    knowledge = integral_memory
    hyper: ClassVar[dict[str, Allowed]] = {"strength": (0, 1e12)}

    def while_learning_first(self, lesson: Lesson) -> AbstractContextManager[Guard]:
        """Record the path integral."""
        return nullcontext(Guard(observer=PathIntegral(_watched(lesson))))

    def after_first(self, lesson: Lesson, guard: Guard) -> Memory:
        """Return the importance of the first task's weights."""
        assert guard.observer is not None
        recorded = {f"{INTEGRAL}{n}": omega for n, omega in guard.observer.tensors.items()}
        return integral_memory(replace(lesson, memory=recorded))

    def while_learning(self, lesson: Lesson, phase: Phase) -> AbstractContextManager[Guard]:
        """Add the penalty, and record the path integral if another task follows."""
        del phase
        memory = {name: tensor.to(lesson.device) for name, tensor in lesson.memory.items()}
        integral = None if lesson.is_last else PathIntegral(_watched(lesson), memory, self.strength)
        return nullcontext(Guard(penalised(lesson, self.strength), integral))

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Add the new task's importance."""
        del phase
        if guard.observer is None:
            return lesson.memory
        end = _watched(lesson)
        precision = importance(guard.observer.tensors, lesson.start, end)
        for name, old in part_of(lesson.memory, PRECISION).items():
            if name in precision:
                precision[name] += old.to(lesson.device)
        return remember(precision, end)
