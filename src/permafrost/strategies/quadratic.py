"""Quadratic penalties: weights are held near a centre, each by its own precision."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from permafrost.errors import NotFiniteError
from permafrost.freezing import current_weights
from permafrost.models import Head, TaskNetwork
from permafrost.strategies.base import Lesson, Memory
from permafrost.training import Batch, Objective, cross_entropy, part_of, recordable

PRECISION, CENTRE = "precision/", "centre/"


def common_parameters(network: TaskNetwork, head: Head, learned: int) -> dict[str, nn.Parameter]:
    """Return the parameters that the learned tasks and the next one both use, by name.

    Parameters
    ----------
    network : TaskNetwork
        In plain layers.
    head : {"shared", "multi", "expanding"}
        A shared head is among them, and of an expanding one what answers for the learned tasks;
        a task's own head is not.
    learned : int
        How many tasks are learned, 1 .. T - 1.
    """
    return {n: p for n, p in network.named_parameters() if _is_common(n, head, learned)}


def _is_common(name: str, head: Head, learned: int) -> bool:
    if not name.startswith("heads."):
        return True
    heads = {"shared": 1, "multi": 0, "expanding": learned}[head]
    return int(name.split(".")[1]) < heads


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


def penalised(lesson: Lesson, factor: float) -> Objective:
    """Return cross entropy + factor · Σ_i precision_i (θ_i − centre_i)².

    The sum runs over :func:`common_parameters`: what is kept of the first task holds its head,
    which under ``multi`` the next task does not use.
    """
    network, memory = lesson.network, lesson.memory
    # A sum depends on its order: by name and in the weights' own memory format, whatever a memory
    # went through on its way.
    like = current_weights(network)
    kept = sorted(part_of(memory, PRECISION))
    names = [name for name in kept if _is_common(name, lesson.head, lesson.learned)]
    precision = {n: torch.empty_like(like[n]).copy_(memory[f"{PRECISION}{n}"]) for n in names}
    centre = {n: torch.empty_like(like[n]).copy_(memory[f"{CENTRE}{n}"]) for n in names}

    @recordable
    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        loss, logits, labels = cross_entropy(model, batch)
        weights = current_weights(network)
        for name, values in precision.items():
            loss = loss + factor * (values * (weights[name] - centre[name]).square()).sum()
        return loss, logits, labels

    return objective
