"""Elastic Weight Consolidation (Kirkpatrick et al. 2017)."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch

from permafrost.data import Batches, LabeledImages
from permafrost.hyper import Allowed
from permafrost.seeding import generator
from permafrost.strategies.base import Guard, Lesson, Memory, Phase, Strategy, strategy
from permafrost.strategies.fisher import fisher_diagonal
from permafrost.strategies.quadratic import (
    CENTRE,
    PRECISION,
    common_parameters,
    penalised,
    remember,
)
from permafrost.training import part_of


def fisher_memory(lesson: Lesson) -> Memory:
    """Return the Fisher information of the task that was just learned, and its weights."""
    task, view = lesson.learned, lesson.view(lesson.learned)
    parameters = common_parameters(lesson.network, lesson.head, task + 1)
    known = {parameter: name for name, parameter in parameters.items()}
    # The view has other names for the same parameters.
    names = {name: known[p] for name, p in view.named_parameters() if p in known}
    batches = Batches(_sample(lesson, task), lesson.sequence.normalization, lesson.device)
    fisher = fisher_diagonal(view, batches.ordered(64), names)
    return remember({names[name]: value for name, value in fisher.items()}, parameters)


def _sample(lesson: Lesson, task: int) -> LabeledImages:
    images = lesson.sequence.tasks[task].train
    order = torch.randperm(len(images), generator=generator(lesson.seed, "fisher", task))
    chosen = order[: lesson.keep.fisher_images].sort().values
    return LabeledImages(images.images[chosen], images.labels[chosen])


@strategy("ewc")
@dataclass(frozen=True)
class Ewc(Strategy):
    """Hold the weights near those of earlier tasks, each by its Fisher information.

    Minimises L(θ) + ½ λ Σ_k Σ_i F_{k,i} (θ_i − θ*_{k,i})² (equation 3), one penalty for each
    earlier task k; F is :func:`fisher_diagonal` on some of its training images. Held are all
    parameters that the next task uses too (:func:`common_parameters`): a shared head is, an old
    task's own head is not. BatchNorm's running statistics drift. Momentum SGD diverges where
    lr · λ · F comes near 4.

    Attributes
    ----------
    strength : float
        λ.
    """

    strength: float = 100.0

    knowledge = fisher_memory
    hyper: ClassVar[dict[str, Allowed]] = {"strength": (0, 1e12)}

    def while_learning(self, lesson: Lesson, phase: Phase) -> AbstractContextManager[Guard]:
        """Add the penalty."""
        del phase
        return nullcontext(Guard(penalised(lesson, self.strength / 2)))

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Add the new task's penalty; a sum of parabolas is a parabola again."""
        del phase, guard
        if lesson.is_last:
            return lesson.memory
        new = fisher_memory(lesson)
        old_precision, old_centre = (part_of(lesson.memory, part) for part in (PRECISION, CENTRE))
        precision, centre = {}, {}
        for name, added in part_of(new, PRECISION).items():
            latest = new[f"{CENTRE}{name}"]
            # A head that the task has added to an expanding one was not held before.
            before = old_precision.get(name, torch.zeros_like(added)).to(added.device)
            precision[name] = before + added
            pull = before * old_centre.get(name, latest).to(added.device) + added * latest
            known = precision[name] > 0
            safe = torch.where(known, precision[name], 1.0)
            centre[name] = torch.where(known, pull / safe, latest)
        return remember(precision, centre)
