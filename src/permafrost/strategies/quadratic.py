"""Quadratic penalties: weights are held near a centre, each by its own precision."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from permafrost.errors import NotFiniteError
from permafrost.freezing import current_weights
from permafrost.models import TaskNetwork
from permafrost.strategies.base import Memory
from permafrost.training import Batch, Objective, cross_entropy, part_of

PRECISION, CENTRE = "precision/", "centre/"


def body_parameters(network: TaskNetwork) -> dict[str, nn.Parameter]:
    """Return all parameters but the heads', by name."""
    return {n: p for n, p in network.named_parameters() if not n.startswith("heads.")}


def remember(precision: Mapping[str, Tensor], centre: Mapping[str, Tensor]) -> Memory:
    """Put precisions and centres into one memory.

    Raises
    ------
    NotFiniteError
        If a precision is not finite; names the parameter.
    """
    for name, value in precision.items():
        if not torch.isfinite(value).all():
            raise NotFiniteError(f"the importance of {name} is not finite")
    memory = {f"{PRECISION}{name}": value for name, value in precision.items()}
    return memory | {f"{CENTRE}{name}": centre[name].detach().clone() for name in precision}


def penalised(network: TaskNetwork, memory: Memory, factor: float) -> Objective:
    """Return cross entropy + factor · Σ_i precision_i (θ_i − centre_i)²."""
    # A sum depends on its order: by name and in the weights' own memory format, whatever a memory
    # went through on its way.
    like = current_weights(network)
    names = sorted(part_of(memory, PRECISION))
    precision = {n: torch.empty_like(like[n]).copy_(memory[f"{PRECISION}{n}"]) for n in names}
    centre = {n: torch.empty_like(like[n]).copy_(memory[f"{CENTRE}{n}"]) for n in names}

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        loss, logits, labels = cross_entropy(model, batch)
        weights = current_weights(network)
        for name, values in precision.items():
            loss = loss + factor * (values * (weights[name] - centre[name]).square()).sum()
        return loss, logits, labels

    return objective
