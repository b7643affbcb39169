"""Accuracy of a network on every task: one row of the accuracy matrix R."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from permafrost.data import Batches
from permafrost.devices import images_at_once
from permafrost.errors import NotFiniteError
from permafrost.evaluation.counts import Accuracy
from permafrost.models import Head, TaskNetwork, measuring


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Batches,
    classes: int,
    *,
    offset: int = 0,
    batch_size: int | None = None,
) -> Accuracy:
    """Measure a classifier on one task's images.

    Parameters
    ----------
    model : nn.Module
        Maps images (N, 3, H, W) to logits; measured in eval mode and true float32 or longer.
    batches : Batches
        Images with labels 0 .. classes - 1; at least one.
    classes : int
        C.
    offset : int
        Added to the labels to index the logits (a class-incremental head).
    batch_size : int, optional
        Images at once; by default as many as suit the device.

    Raises
    ------
    NotFiniteError
        If a logit is not finite: the largest of such says nothing.
    ValueError
        If there are no images.
    """
    return _counted(lambda images: _measured(model, images), batches, classes, offset, batch_size)


def _measured(model: nn.Module, images: Tensor) -> Tensor:
    with measuring(model):
        logits: Tensor = model(images)
    return logits


def _counted(
    answer: Callable[[Tensor], Tensor],
    batches: Batches,
    classes: int,
    offset: int,
    batch_size: int | None = None,
) -> Accuracy:
    """Count the images for which the largest logit is the right one."""
    if not len(batches):
        raise ValueError("there are no images to measure the accuracy on")
    size = batch_size or images_at_once(batches.images, on_cpu=256)
    # Read at the end alone: to read a number waits for the device.
    answers, finite = [], []
    for images, _ in batches.ordered(size):
        logits = answer(images)
        answers.append(logits.argmax(1))
        finite.append(torch.isfinite(logits).all())
    if not all(torch.stack(finite).tolist()):
        raise NotFiniteError("a logit is not finite")
    labels = batches.labels.cpu()
    hits = torch.cat(answers).cpu() == labels + offset
    correct = torch.bincount(labels[hits], minlength=classes)
    count = torch.bincount(labels, minlength=classes)
    return Accuracy(tuple(correct.tolist()), tuple(count.tolist()))


def accuracy_row(
    networks: Sequence[TaskNetwork],
    tests: Sequence[Batches],
    head: Head,
    seen: int,
    tasks: Collection[int] | None = None,
) -> list[Accuracy | None]:
    """Measure a network on every task: row ``seen`` of R.

    Parameters
    ----------
    networks : sequence of TaskNetwork
        For each task the network that answers for it, after learning ``seen`` tasks; most methods
        have one for all.
    tests : sequence of Batches
        The test images of the tasks.
    head : {"shared", "multi", "expanding"}
        How a task is answered.
    seen : int
        0 .. T tasks learned; 0 is the untrained network.
    tasks : collection of int, optional
        Which are measured; by default all.

    Returns
    -------
    list of Accuracy or None
        One for each task; None where it is not measured, and where an expanding head has no output
        yet for the task's classes.
    """
    heads = max(seen, 1)  # the untrained network has its first head
    return [
        None
        if (head == "expanding" and task >= heads) or (tasks is not None and task not in tasks)
        else accuracy(
            network.view(head, task, heads),
            test,
            network.classes[task],
            offset=network.label_offset(head, task),
        )
        for task, (network, test) in enumerate(zip(networks, tests, strict=True))
    ]


@torch.no_grad()
def row_without_task(
    networks: Sequence[TaskNetwork], tests: Sequence[Batches], head: Head
) -> list[Accuracy] | None:
    """Measure a network that is not told the task: one softmax over all classes of all tasks.

    A task's logits are those of the network that answers for it, and all tasks' logits are joined:
    where a method keeps a mask for each task, each mask is run on every image.

    Parameters
    ----------
    networks, tests
        As for :func:`accuracy_row`, all tasks learned.
    head : {"shared", "multi", "expanding"}
        How a task is answered.

    Returns
    -------
    list of Accuracy or None
        One for each task. None where one network with a shared head answers for all tasks: it
        gives the same logits for each.
    """
    apart = len({id(network) for network in networks}) > 1
    if head == "shared" and not apart:
        return None
    views = [
        network.view("shared" if head == "shared" else "multi", task, len(networks))
        for task, network in enumerate(networks)
    ]
    counts = networks[0].classes

    def answer(images: Tensor) -> Tensor:
        if not apart:
            return _measured(networks[0].view("expanding", 0, len(networks)), images)
        return torch.cat([_measured(view, images) for view in views], dim=1)

    return [
        _counted(answer, test, counts[task], sum(counts[:task])) for task, test in enumerate(tests)
    ]
