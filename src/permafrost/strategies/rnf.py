"""Relevance-based Neural Freezing (Ede et al., CD-MAKE 2022)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from permafrost.data import Batches
from permafrost.evaluation.accuracy import accuracy
from permafrost.hyper import Allowed
from permafrost.ranking.ablation import silenced
from permafrost.ranking.features import feature_layers
from permafrost.ranking.method import show_images
from permafrost.ranking.relevance import relevance_normalized
from permafrost.ranking.weight_scores import permuted
from permafrost.strategies.base import Lesson, strategy
from permafrost.strategies.freeze import FreezesFilters
from permafrost.strategies.old_network import black_image
from permafrost.strategies.sized import CHANCE

_CRITERION = relevance_normalized.__name__
# Filters are set free by so many at once.
_STEPS = 100


@strategy("rnf")
@dataclass(frozen=True)
class Rnf(FreezesFilters):
    """Freeze all filters but those that the old task can do without.

    The filters of all layers together are ordered by their relevance for the task learned last,
    each image's and layer's divided by the sum of its sizes (criterion ``relevance_normalized``,
    mean over the classes). The least relevant are set free, a hundredth of all at a time, as long
    as the accuracy on the task's validation images without them is not more than ``margin`` below
    that with all; the others are frozen. A task without validation images is judged by its training
    images. In the paper the relevance of an ε-rule is summed over the images, the steps are tuned,
    and frozen units have a learning rate of 0: their norms' statistics move.

    Attributes
    ----------
    margin : float
        0..1, in parts of all images.
    """

    margin: float = 0.05

    hyper: ClassVar[dict[str, Allowed]] = {"margin": (0, 1)}
    twins: ClassVar[tuple[str, ...]] = (CHANCE,)

    def choose(self, lesson: Lesson) -> dict[str, Tensor]:
        """Return the filters that the task cannot do without; in a twin as many others."""
        accuracy_without = _silencing(lesson)
        least = accuracy_without({}) - self.margin
        for free in _ever_more(_relevance(lesson)):
            if accuracy_without(free) < least:
                break
            kept = {name: ~mask for name, mask in free.items()}
        if self.twin == CHANCE:
            kept = {n: permuted(m, lesson.seed, "rnf", lesson.learned, n) for n, m in kept.items()}
        return kept


def _silencing(lesson: Lesson) -> Callable[[Mapping[str, Tensor]], float]:
    """Return what tells the accuracy on the task learned last without some filters."""
    view, task = _view(lesson), lesson.sequence.tasks[lesson.learned - 1]
    judged = task.validation if len(task.validation) else task.train
    batches = Batches(judged, lesson.sequence.normalization, lesson.device)
    layers = feature_layers(view, black_image(lesson))

    def accuracy_without(free: Mapping[str, Tensor]) -> float:
        with silenced(view, layers, free):
            return accuracy(view, batches, len(task.classes)).overall

    return accuracy_without


def _view(lesson: Lesson) -> nn.Module:
    # The task's own logits, which an expanding head has among others.
    own = "multi" if lesson.head == "expanding" else lesson.head
    return lesson.network.view(own, lesson.learned - 1, lesson.learned)


def _relevance(lesson: Lesson) -> dict[str, Tensor]:
    task = lesson.learned - 1
    classes = len(lesson.sequence.tasks[task].classes)
    found = show_images(_view(lesson), lesson.batches(task), classes, [_CRITERION])[_CRITERION]
    return {name: scores.mean(1).cpu() for name, scores in found.items()}


def _ever_more(scores: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield which filters are free: none, then ever more of the least relevant, at last all."""
    every = torch.cat(list(scores.values()))
    order = every.argsort(stable=True)
    sizes = [len(values) for values in scores.values()]
    for step in range(_STEPS + 1):
        free = torch.zeros(len(every), dtype=torch.bool)
        free[order[: round(step * len(every) / _STEPS)]] = True
        yield dict(zip(scores, free.split(sizes), strict=True))
