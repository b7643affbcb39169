"""Experience replay (Chaudhry et al. 2019): a few old images are learned again with the new."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.data import Batches, LabeledImages
from permafrost.seeding import generator
from permafrost.strategies.base import Guard, Lesson, Memory, Phase, Strategy, strategy
from permafrost.strategies.old_heads import head_logits
from permafrost.training import Batch, recordable


def buffer_memory(lesson: Lesson) -> Memory:
    """Draw the images that the buffer holds of the task that was just learned."""
    task = lesson.learned
    train = lesson.sequence.tasks[task].train
    order = torch.randperm(len(train), generator=generator(lesson.seed, "buffer", task))
    labels = train.labels[order]
    # The classes take turns: by how many images of its own class come before each.
    turn = torch.empty_like(order)
    for label in labels.unique():
        mine = labels == label
        turn[mine] = torch.arange(int(mine.sum()))
    chosen = order[turn.sort(stable=True).indices[: lesson.keep.buffer_images]]
    return {f"{task}/images": train.images[chosen], f"{task}/labels": train.labels[chosen]}


@strategy("replay")
@dataclass(frozen=True)
class Replay(Strategy):
    """Add to each step as many images of the earlier tasks, drawn from a small buffer.

    The loss is the mean cross entropy of the new images plus that of the old ones, in one forward
    pass. The buffer holds a few training images of each earlier task, drawn at random, as many of
    each class as far as they divide.
    """

    knowledge = buffer_memory
    step_cost: ClassVar[float] = 2.0  # twice the images
    remark: ClassVar[str] = "keeps old images"

    def while_learning(self, lesson: Lesson, phase: Phase) -> AbstractContextManager[Guard]:
        """Mix the buffer's images into every batch."""
        del phase
        kept = buffers(lesson, lesson.memory, range(lesson.learned))

        def draw(batch: Batch) -> tuple[Tensor, ...]:
            share = max(1, len(batch.labels) // len(kept))
            drawn = [_draw(lesson, old, share, batch, task) for task, old in enumerate(kept)]
            return tuple(tensor for parts in drawn for tensor in parts)

        @recordable
        def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            assert isinstance(model, nn.Sequential)
            images, labels = batch.drawn[::3], batch.drawn[1::3]
            sizes = [len(batch.labels), *map(len, labels)]
            new, *parts = model[:-1](torch.cat([batch.images, *images])).split(sizes)
            logits = model[-1](new)
            losses = [
                F.cross_entropy(
                    head_logits(lesson.network, lesson.head, task, lesson.learned + 1, part),
                    right + lesson.network.label_offset(lesson.head, task),
                )
                for task, (part, right) in enumerate(zip(parts, labels, strict=True))
            ]
            loss = F.cross_entropy(logits, batch.labels) + torch.stack(losses).mean()
            return loss, logits, batch.labels

        return nullcontext(Guard(objective, draw=draw))

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Keep some images of the task that was learned."""
        del phase, guard
        if lesson.is_last:
            return lesson.memory
        return lesson.memory | buffer_memory(lesson)


def buffers(lesson: Lesson, memory: Memory, tasks: Iterable[int]) -> list[Batches]:
    """Return the images that are kept of tasks."""
    return [
        Batches(
            LabeledImages(memory[f"{task}/images"], memory[f"{task}/labels"]),
            lesson.sequence.normalization,
            lesson.device,
        )
        for task in tasks
    ]


def _draw(
    lesson: Lesson, buffer: Batches, size: int, batch: Batch, task: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw augmented images by the step's own generator, so that a training can resume.

    Returns
    -------
    tuple of (Tensor, Tensor, Tensor)
        Images, labels and where they stand in the buffer.
    """
    purpose = (lesson.seed, "replay", lesson.learned, task, batch.epoch, batch.step)
    config = replace(lesson.config, **lesson.sequence.tasks[task].training)
    drawn = buffer.epoch(generator(*purpose), size, flip=config.flip, padding=config.padding)
    return next(drawn)
