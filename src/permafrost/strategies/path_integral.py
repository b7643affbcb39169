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

    recordable = True

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
        moved = {name: p for name, p in self._parameters.items() if p.grad is not None}
        if not moved:
            return
        # All at once: on a GPU each call of an operation takes longer than its arithmetic.
        moves = torch._foreach_sub([*moved.values()], [self._before[name] for name in moved])
        torch._foreach_mul_(moves, [self._gradient(name, p) for name, p in moved.items()])
        torch._foreach_sub_([self.tensors[name] for name in moved], moves)

    def _gradient(self, name: str, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        if name not in self._precision:
            return parameter.grad
        pull = self._precision[name] * (self._before[name] - self._centre[name])
        return parameter.grad - 2 * self._factor * pull
