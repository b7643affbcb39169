"""Remembering for the Right Reasons (Ebrahimi et al., ICLR 2021)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from permafrost.hyper import Allowed
from permafrost.strategies.base import Guard, Lesson, Memory, Phase, strategy
from permafrost.strategies.lwm import Maps, attention_layer, channel_order, picked
from permafrost.strategies.old_heads import head_logits
from permafrost.strategies.replay import Replay, buffer_memory, buffers
from permafrost.strategies.sized import CHANCE
from permafrost.training import Batch, recordable


def explained_buffer_memory(lesson: Lesson) -> Memory:
    """Draw a buffer of the task that was just learned, with each image's map of its true class."""
    return with_maps(lesson, buffer_memory(lesson), lesson.learned)


def with_maps(lesson: Lesson, memory: Memory, task: int, *, by_chance: bool = False) -> Memory:
    """Return a memory with the maps of a task's images as the network sees them now."""
    (own,) = buffers(lesson, memory, [task])
    maps = grad_cam(lesson, by_chance=by_chance)
    made = [
        true_class_maps(lesson, maps, task, images, labels).detach().cpu()
        for images, labels in own.ordered(64)
    ]
    return memory | {f"{task}/maps": torch.cat(made)}


def grad_cam(lesson: Lesson, *, by_chance: bool) -> Maps:
    """Return how maps are made, by chance with each channel's weight given to another."""
    layer = attention_layer(lesson, lesson.network)
    return Maps("gradcam", layer, channel_order(lesson, layer) if by_chance else None)


def true_class_maps(
    lesson: Lesson, maps: Maps, task: int, images: Tensor, labels: Tensor
) -> Tensor:
    """Return maps (N, h, w) of images' true classes, with a graph; labels count from 0."""
    network = lesson.network
    view = cast(nn.Sequential, network.view("shared", 0, 1))

    def answer(images: Tensor) -> Tensor:
        embedding = view[:-1](images)
        logits = head_logits(network, lesson.head, task, lesson.learned + 1, embedding)
        return picked(logits, labels + network.label_offset(lesson.head, task))

    return maps.of(view, answer, images)


IMAGES = "images"


@strategy("rrr")
@dataclass(frozen=True)
class Rrr(Replay):
    """Replay old images, and let them be answered for the old reasons.

    Minimises replay's loss + λ · mean over old images and positions of |M − M'| (equation 4), where
    M is the network's Grad-CAM map of an old image's true class and M' the one that was stored when
    the image entered the buffer; the maps' bytes count as memory. The gradient flows through the
    map, through its channels' weights too. Layer and mode are as in ``lwm``. The images that are
    explained are the buffer's own, unaugmented, as those whose maps were stored; as many of each
    task as are replayed in the step.

    Its twin by chance gives every channel another one's weight in the maps, where they are stored
    and where they are compared; its twin by images is replay, the maps' bytes spent on images.

    The authors' code explains the predicted class, and its step on the maps moves no weight, as we
    read it. λ is that of their configuration for CUB-200, where it scales a step of an optimizer of
    its own: tune it.

    Attributes
    ----------
    reasons : float
        λ.
    """

    reasons: float = 100.0

    knowledge = explained_buffer_memory
    hyper: ClassVar[dict[str, Allowed]] = {"reasons": (0, 1e6)}
    twins: ClassVar[tuple[str, ...]] = (CHANCE, IMAGES)
    explained_by: ClassVar[str | None] = "reasons"
    remark: ClassVar[str] = "keeps old images and maps"
    step_cost: ClassVar[float] = 4.0

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Add the maps' distance to replay's loss."""
        lesson = replace(lesson, memory=self._remembered(lesson))
        if self.twin == IMAGES:
            with super().while_learning(lesson, phase) as plain:
                yield replace(plain, chosen=lesson.memory)
            return
        tasks = range(lesson.learned)
        owned = buffers(lesson, lesson.memory, tasks)
        stored = [lesson.memory[f"{task}/maps"].to(lesson.device) for task in tasks]
        maps = grad_cam(lesson, by_chance=self.twin == CHANCE)
        with super().while_learning(lesson, phase) as plain:
            assert plain.draw is not None
            replayed = plain.draw

            def draw(batch: Batch) -> tuple[Tensor, ...]:
                drawn = replayed(batch)
                positions = drawn[2::3]
                clean = [buffer.at(chosen) for buffer, chosen in zip(owned, positions, strict=True)]
                reasons = [kept[chosen] for kept, chosen in zip(stored, positions, strict=True)]
                return (*drawn, *clean, *reasons)

            @recordable
            def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
                count = 3 * len(tasks)
                replay = replace(batch, drawn=batch.drawn[:count])
                clean, kept = batch.drawn[count : count + len(tasks)], batch.drawn[-len(tasks) :]
                loss, logits, labels = plain.objective(model, replay)
                apart = [
                    (true_class_maps(lesson, maps, task, clean[task], right) - kept[task])
                    .abs()
                    .mean()
                    for task, right in enumerate(replay.drawn[1::3])
                ]
                return loss + self.reasons * torch.stack(apart).mean(), logits, labels

            yield replace(plain, objective=objective, draw=draw, chosen=lesson.memory)

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Keep some images of the task that was learned, with their maps."""
        del phase
        if lesson.is_last:
            return guard.chosen
        if self.twin == IMAGES:
            return guard.chosen | buffer_memory(_with_more_images(lesson, guard.chosen))
        memory, task = buffer_memory(lesson), lesson.learned
        return guard.chosen | with_maps(lesson, memory, task, by_chance=self.twin == CHANCE)

    def _remembered(self, lesson: Lesson) -> Memory:
        """Return what is kept of the tasks before; of the first one a twin makes its own."""
        if self.twin is None or lesson.learned > 1:
            return lesson.memory
        if self.twin == CHANCE:
            return with_maps(lesson, lesson.memory, 0, by_chance=True)
        return buffer_memory(replace(_with_more_images(lesson, lesson.memory), learned=0))


def _with_more_images(lesson: Lesson, memory: Memory) -> Lesson:
    """Return the lesson with room for as many more images as the maps' bytes hold."""
    images = memory["0/images"]
    if "0/maps" not in memory:
        return replace(lesson, keep=replace(lesson.keep, buffer_images=len(images)))
    more = memory["0/maps"].nbytes // images[0].nbytes
    return replace(lesson, keep=replace(lesson.keep, buffer_images=len(images) + more))
