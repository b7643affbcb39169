"""Protection by degrees: the more two filters matter, the slower the weight between them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from permafrost.hyper import Allowed
from permafrost.models import TaskNetwork
from permafrost.models.channels import Channels, read_by, trace_channels
from permafrost.ranking.weight_scores import permuted
from permafrost.strategies.base import (
    FilterRanking,
    Guard,
    Lesson,
    Memory,
    Phase,
    Strategy,
    part_with,
    strategy,
)
from permafrost.strategies.sized import CHANCE, EQUAL
from permafrost.training import part_of

IMPORTANCE = "importance/"


@strategy("soft")
@dataclass(frozen=True)
class Soft(Strategy):
    """Slow every weight by the importance of the two filters that it joins.

    After each step of the optimizer a weight has made the part ``1 − min(I_out, I_in)^exponent`` of
    its move, where I_out is the importance of the filter that the weight belongs to and I_in that
    of the filter that it reads, 1 for the image. A filter's importance is its place in its layer's
    ranking, from 1 for the best to 0 for the last, the greatest of all tasks learned so far; of
    channels that are sums it is the greatest of their filters. A bias moves by its own filter's, a
    norm's γ and β by their channel's. Heads move freely, and the running statistics of a BatchNorm
    too. FG-AdaHAT scales updates so, by unit importances of its own.

    Attributes
    ----------
    exponent : float
        The greater, the fewer weights are held.
    ranking : callable
        What ranks the filters.
    """

    exponent: float = 1.0
    ranking: FilterRanking = field(kw_only=True)

    hyper: ClassVar[dict[str, Allowed]] = {"exponent": (0, 100)}
    ranks: ClassVar[bool] = True
    twins: ClassVar[tuple[str, ...]] = (CHANCE, EQUAL)
    explained_by: ClassVar[str | None] = "exponent"
    step_cost: ClassVar[float] = 1.1

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Scale every step."""
        del phase
        channels = trace_channels(lesson.network.features, "features.")
        orders = self.ranking.orders(lesson)
        before = part_of(lesson.memory, IMPORTANCE)
        importance = {
            name: torch.maximum(by_rank(orders[name]), before.get(name, torch.zeros(())))
            for name in channels.gives
        }
        used = importance
        if self.twin == CHANCE:  # the same order in all tasks, and for all filters of a sum
            used = {
                name: permuted(values, lesson.seed, "soft", channels.gives[name])
                for name, values in importance.items()
            }
        held = held_parts(lesson.network, channels, used, self.exponent)
        if self.twin == EQUAL:
            held = {name: torch.full_like(part, float(part.mean())) for name, part in held.items()}
        kept = {f"{IMPORTANCE}{name}": value for name, value in importance.items()}
        yield Guard(observer=ScaledMoves(lesson.network, held), chosen=kept)

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Note how much the filters matter."""
        del phase
        return lesson.memory | part_with(guard.chosen, IMPORTANCE)


def by_rank(order: Tensor) -> Tensor:
    """Return each filter's importance, 1 for the first of an order and 0 for the last."""
    importance = torch.empty(len(order))
    importance[order.cpu()] = 1 - torch.arange(len(order)) / max(1, len(order) - 1)
    return importance


def held_parts(
    network: TaskNetwork,
    channels: Channels,
    importance: Mapping[str, Tensor],
    exponent: float,
) -> dict[str, Tensor]:
    """Return the part of its moves that each parameter of the body does not make.

    Parameters
    ----------
    network : TaskNetwork
        Its body is followed by ``channels``.
    channels : Channels
        Of its body.
    importance : mapping of str to Tensor, shape (F,)
        0..1, by convolution.
    exponent : float
        Of the importance.

    Returns
    -------
    dict of str to Tensor
        By the parameters' names, of their shapes; 0..1.
    """
    groups: dict[str, Tensor] = {}
    for name, group in channels.gives.items():
        groups[group] = torch.maximum(importance[name], groups.get(group, torch.zeros(())))
    held = {}
    for name, conv in network.named_modules():
        if name in channels.norms:
            own = groups[channels.norms[name]]
        elif name in channels.gives:
            assert isinstance(conv, nn.Conv2d)
            own, read = importance[name], channels.reads[name]
            inputs = torch.ones(conv.in_channels) if read is None else groups[read]
            both = torch.minimum(own[:, None], read_by(conv, inputs))[:, :, None, None]
            held[f"{name}.weight"] = both.expand_as(conv.weight)
        else:
            continue
        for part, value in conv.named_parameters(recurse=False):
            if value.ndim == 1:
                held[f"{name}.{part}"] = own
    return {name: part.pow(exponent) for name, part in held.items()}


class ScaledMoves:
    """Lets each weight make a part of the move that the optimizer has made.

    Parameters
    ----------
    network : nn.Module
        In training.
    held : mapping of str to Tensor
        By the parameters' names, of their shapes: the part that is not made, 0..1.

    Attributes
    ----------
    tensors : dict of str to Tensor
        None: it has no state.
    """

    recordable = True

    def __init__(self, network: nn.Module, held: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {}
        parameters = dict(network.named_parameters())
        self._parameters: list[Tensor] = [parameters[name] for name in held]
        self._made = [
            (1 - part).to(p).contiguous()
            for part, p in zip(held.values(), self._parameters, strict=True)
        ]
        self._before: list[Tensor] = []

    def before_step(self) -> None:
        """Keep the weights."""
        self._before = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def after_step(self) -> None:
        """Take back what is not to be made; exact where all or nothing is."""
        kept = torch._foreach_lerp(self._before, self._parameters, self._made)
        torch._foreach_copy_(self._parameters, kept)
