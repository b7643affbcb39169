"""Accuracy of a network on every task: one row of the accuracy matrix R."""

from collections.abc import Sequence

import torch
from torch import nn

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
    if not len(batches):
        raise ValueError("there are no images to measure the accuracy on")
    size = batch_size or images_at_once(batches.images, on_cpu=256)
    # Read at the end alone: to read a number waits for the device.
    answers, finite = [], []
    for images, _ in batches.ordered(size):
        with measuring(model):
            logits = model(images)
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
    networks: Sequence[TaskNetwork], tests: Sequence[Batches], head: Head, seen: int
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

    Returns
    -------
    list of Accuracy or None
        One for each task; None where an expanding head has no output yet for the task's classes.
    """
    heads = max(seen, 1)  # the untrained network has its first head
    return [
        None
        if head == "expanding" and task >= heads
        else accuracy(
            network.view(head, task, heads),
            test,
            network.classes[task],
            offset=network.label_offset(head, task),
        )
        for task, (network, test) in enumerate(zip(networks, tests, strict=True))
    ]
