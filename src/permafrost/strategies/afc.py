"""Adaptive Feature Consolidation (Kang, Park & Han, CVPR 2022)."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.explain.activations import activations, block_ends
from permafrost.hyper import Allowed
from permafrost.models import measuring
from permafrost.ranking.features import feature_layers
from permafrost.ranking.weight_scores import permuted
from permafrost.strategies.base import FilterRanking, Guard, Lesson, Memory, Phase, strategy
from permafrost.strategies.lwf import Lwf
from permafrost.strategies.old_network import (
    black_image,
    old_network,
    old_network_memory,
    safe_norm,
)
from permafrost.strategies.sized import CHANCE, EQUAL
from permafrost.strategies.soft import by_rank
from permafrost.training import Batch, part_of, recordable

IMPORTANCE = "importance/"


def consolidation_memory(lesson: Lesson) -> Memory:
    """Keep the network and what LwF keeps, and how much each filter of a block's end matters."""
    found = {f"{IMPORTANCE}{name}": value for name, value in importance(lesson).items()}
    return old_network_memory(lesson) | found


def importance(lesson: Lesson) -> dict[str, Tensor]:
    """Return I_c = mean over images of ‖∂L/∂Z_c‖²_F of each block's filters, in means of the layer.

    Z is a block's output on the training images of the task that was learned last, L the cross
    entropy (equation 6). The mean over the images is of each image's own gradient.

    Returns
    -------
    dict of str to Tensor, shape (F,)
        By convolution, of mean 1; of mean 0 where the loss does not depend on the layer.
    """
    task = lesson.learned
    view, layers = lesson.view(task), _blocks(lesson)
    offset = lesson.network.label_offset(lesson.head, task)
    sums = {name: torch.zeros((), device=lesson.device) for name in layers}
    for images, labels in lesson.batches(task).ordered(64):
        with measuring(view), torch.enable_grad(), activations(view, layers) as found:
            loss = F.cross_entropy(view(images), labels + offset, reduction="sum")
            gradients = torch.autograd.grad(loss, [found[name] for name in layers])
        for name, gradient in zip(layers, gradients, strict=True):
            sums[name] = sums[name] + gradient.square().sum((0, 2, 3))
    return {name: (total / _or_one(total.mean())).cpu() for name, total in sums.items()}


def _or_one(value: Tensor) -> Tensor:
    return value.where(value > 0, 1)


def _blocks(lesson: Lesson) -> dict[str, str]:
    images = black_image(lesson)
    view = lesson.network.view("shared", 0, 1)
    layers = feature_layers(view, images)
    return {conv: layers[conv] for conv in block_ends(view, images)}


@strategy("afc")
@dataclass(frozen=True)
class Afc(Lwf):
    """Keep the maps of the filters that the old task's loss depends on most.

    Minimises LwF's loss + γ · √(classes seen / classes of the task) · mean over blocks, images and
    filters of I_c · ‖u(Z_c) − u(Z_c')‖₂ (equations 4 and 7), where Z and Z' are the new and the old
    network's maps at the end of a block, u(Z) their squares divided by the L2 norm of these over
    the positions, and I is :func:`importance`. The paper keeps exemplars and a cosine classifier;
    here LwF takes their place, whose weight and γ the paper so does not give. A block ends at the
    last convolution of each size of maps, behind its norm and the ReLU if one follows (the authors'
    ResNet: before it).

    Attributes
    ----------
    consolidation : float
        γ.
    """

    consolidation: float = 1.0

    knowledge = consolidation_memory
    hyper: ClassVar[dict[str, Allowed]] = {**Lwf.hyper, "consolidation": (0, 1e6)}
    twins: ClassVar[tuple[str, ...]] = (CHANCE, EQUAL)
    explained_by: ClassVar[str | None] = "consolidation"
    step_cost: ClassVar[float] = 1.4

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Add the maps' distance to LwF's loss."""
        old = old_network(lesson).view("shared", 0, 1)
        layers = _blocks(lesson)
        kept = self._importance(lesson)
        weights = {name: self._weighted(kept[name], lesson, name) for name in layers}
        classes = lesson.network.classes[: lesson.learned + 1]
        factor = self.consolidation * math.sqrt(sum(classes) / classes[-1])
        with super().while_learning(lesson, phase) as plain:

            @recordable
            def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
                with activations(lesson.network.view("shared", 0, 1), layers) as new:
                    loss, logits, labels = plain.objective(model, batch)
                with torch.no_grad(), activations(old, layers) as before:
                    old[:-1](batch.images)
                return loss + factor * map_distance(new, before, weights), logits, labels

            yield replace(plain, objective=objective)

    def _importance(self, lesson: Lesson) -> Mapping[str, Tensor]:
        """Return how much each filter of a block's end mattered for the tasks before."""
        return part_of(lesson.memory, IMPORTANCE)

    def _weighted(self, importance: Tensor, lesson: Lesson, name: str) -> Tensor:
        """Return a layer's importances, or what a twin has in their place."""
        if self.twin == CHANCE:
            importance = permuted(importance, lesson.seed, lesson.learned, name)
        elif self.twin == EQUAL:
            importance = torch.full_like(importance, float(importance.mean()))
        return importance.to(lesson.device)

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Measure how much each filter matters for the task that was learned."""
        del phase, guard
        return lesson.memory if lesson.is_last else consolidation_memory(lesson)


@strategy("afc_ranked")
@dataclass(frozen=True)
class AfcRanked(Afc):
    """Keep the maps of the filters that a criterion ranks first.

    As :class:`Afc`, with a filter's place in its layer's ranking, 1 for the best to 0 for the last
    and in means of the layer, in the place of its importance.

    Attributes
    ----------
    ranking : callable
        What ranks the filters.
    """

    ranking: FilterRanking = field(kw_only=True)

    ranks: ClassVar[bool] = True

    def _importance(self, lesson: Lesson) -> Mapping[str, Tensor]:
        ranked = {name: by_rank(order) for name, order in self.ranking.orders(lesson).items()}
        return {name: values / _or_one(values.mean()) for name, values in ranked.items()}


def map_distance(
    new: Mapping[str, Tensor], old: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Tensor:
    """Return the mean over layers, images and filters of I_c · ‖u(Z_c) − u(Z_c')‖₂.

    Parameters
    ----------
    new, old : mapping of str to Tensor, shape (N, F, h, w)
        Maps by layer.
    weights : mapping of str to Tensor, shape (F,)
        I.
    """
    layers = [
        (weights[name] * _norm(_unit_squares(new[name]) - _unit_squares(old[name]))).mean()
        for name in weights
    ]
    return torch.stack(layers).mean()


def _unit_squares(maps: Tensor) -> Tensor:
    squares = maps.flatten(2).square()
    return squares / safe_norm(squares.square().sum(2, keepdim=True))


def _norm(values: Tensor) -> Tensor:
    """Return L2 norms over the last dimension, whose gradient is 0 where they are."""
    squares = values.square().sum(-1)
    return torch.where(squares > 0, safe_norm(squares), 0)
