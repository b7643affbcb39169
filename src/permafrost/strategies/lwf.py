"""Learning without Forgetting (Li & Hoiem 2016)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.errors import NotFiniteError
from permafrost.hyper import Allowed
from permafrost.models import measuring
from permafrost.strategies.base import Guard, Lesson, Memory, Phase, Strategy, strategy
from permafrost.strategies.old_heads import old_logits
from permafrost.training import Batch, recordable

TEACHER = "teacher"


@torch.no_grad()
def teacher_memory(lesson: Lesson) -> Memory:
    """Record what the network that has just learned a task answers to the next task's images.

    Raises
    ------
    NotFiniteError
        If an answer is not finite.
    """
    network, learned = lesson.network, lesson.learned + 1
    body = lesson.view(0)[:-1]
    with measuring(network):
        answers = [
            torch.cat(old_logits(network, lesson.head, learned, body(images)), dim=1)
            for images, _ in lesson.batches(learned).ordered(256)
        ]
    teacher = torch.cat(answers).cpu()
    if not torch.isfinite(teacher).all():
        raise NotFiniteError("the old network's answers are not finite")
    return {TEACHER: teacher}


@strategy("lwf")
@dataclass(frozen=True)
class Lwf(Strategy):
    """Keep the answers that the old network gave to the new task's images.

    Minimises cross entropy + λ_o · mean over images of −Σ_c y'_c log ŷ'_c, where y' and ŷ' are the
    old network's recorded and the new one's softmax at temperature T over the old classes
    (equations 2 to 5). As in the paper each image's answer is recorded once, unaugmented. Under a
    head per task the sum runs over the old heads, which stay as they are. The paper's warm-up, in
    which a new head is first trained alone, is left out: with a head per task it brought nothing to
    the first task. On the digits (VGG16-BN of width 0.25, 5 + 5 classes, λ_o 1, T 2, mean of three
    seeds) tasks 1 and 2 ended at 85.7 and 96.3 without it, at 85.0 and 97.8 behind 5 epochs of it,
    at 84.8 and 98.4 behind 20, on top of the 10 epochs that every method has.

    Attributes
    ----------
    weight : float
        λ_o.
    temperature : float
        T.
    """

    weight: float = 1.0
    temperature: float = 2.0

    knowledge = teacher_memory
    hyper: ClassVar[dict[str, Allowed]] = {
        "weight": (0, 1e6),
        "temperature": (0.01, 1e3),
    }

    def while_learning(self, lesson: Lesson, phase: Phase) -> AbstractContextManager[Guard]:
        """Add the distillation loss."""
        del phase
        teacher = lesson.memory[TEACHER].to(lesson.device)

        @recordable
        def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            assert isinstance(model, nn.Sequential)
            embedding = model[:-1](batch.images)
            logits = model[-1](embedding)
            old = old_logits(lesson.network, lesson.head, lesson.learned, embedding)
            loss = F.cross_entropy(logits, batch.labels)
            kept = distillation(old, teacher[batch.positions], self.temperature)
            return loss + self.weight * kept, logits, batch.labels

        return nullcontext(Guard(objective))

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Record the answers to the next task's images."""
        del phase, guard
        return lesson.memory if lesson.is_last else teacher_memory(lesson)


def distillation(logits: Sequence[Tensor], teacher: Tensor, temperature: float) -> Tensor:
    """Return the cross entropy of softened answers, in nats.

    Parameters
    ----------
    logits : sequence of Tensor, shape (N, C)
        Of the new network; a softmax for each group, whose losses add up.
    teacher : Tensor, shape (N, sum of C)
        Of the old network, the groups side by side.
    temperature : float
        T > 0; logits are divided by it.
    """
    terms = []
    groups = teacher.split([group.shape[1] for group in logits], dim=1)
    for new, old in zip(logits, groups, strict=True):
        targets = (old / temperature).softmax(dim=1)
        # In the teacher's type: autocast leaves short logits short here.
        terms.append(targets * (new.to(teacher.dtype) / temperature).log_softmax(dim=1))
    return -torch.cat(terms, dim=1).sum(dim=1).mean()
