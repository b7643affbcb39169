"""Synaptic Intelligence (Zenke, Poole & Ganguli 2017)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from permafrost.strategies.base import Guard, Lesson, Memory, Phase, Strategy
from permafrost.strategies.quadratic import (
    CENTRE,
    PRECISION,
    common_parameters,
    penalised,
    remember,
)
from permafrost.training import part_of

XI = 0.1
INTEGRAL = "integral/"


class PathIntegral:
    """Records ω_i = −Σ_steps g_i Δθ_i, how much each weight's moves lowered the loss (equation 3).

    Parameters
    ----------
    parameters : mapping of str to nn.Parameter
        What is watched.
    memory : mapping of str to Tensor, optional
        Of a quadratic penalty in the objective: g is the gradient without it.
    factor : float
        Of that penalty.

    Attributes
    ----------
    tensors : dict of str to Tensor
        ω.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        memory: Memory | None = None,
        factor: float = 0.0,
    ) -> None:
        self.tensors = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._parameters = parameters
        self._precision = part_of(memory or {}, PRECISION)
        self._centre = part_of(memory or {}, CENTRE)
        self._factor = factor
        self._before: dict[str, Tensor] = {}

    def before_step(self) -> None:
        """Keep the weights."""
        self._before = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Add −g Δθ; the gradients are still those that the step was made of."""
        for name, parameter in self._parameters.items():
            before, gradient = self._before[name], parameter.grad
            if gradient is None:
                continue
            if name in self._precision:
                pull = self._precision[name] * (before - self._centre[name])
                gradient = gradient - 2 * self._factor * pull
            self.tensors[name] -= gradient * (parameter - before)


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

    strength: float = 0.0

    name: ClassVar[str] = "si"
    knowledge: ClassVar[str | None] = "path_integral"
    hyper: ClassVar[dict[str, tuple[float, float]]] = {"strength": (0, 1e12)}

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
