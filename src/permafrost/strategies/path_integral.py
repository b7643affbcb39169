"""How much each weight's moves have lowered the loss (Zenke, Poole & Ganguli 2017)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from permafrost.strategies.base import Memory
from permafrost.strategies.quadratic import CENTRE, PRECISION
from permafrost.training import part_of

# What it recorded, in a memory.
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
