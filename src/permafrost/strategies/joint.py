"""Joint training on all tasks at once, from the initial weights: the usual upper baseline.

The one-softmax form (an expanding head over all classes) is what the seed compared with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permafrost.data import LabeledImages, Task
from permafrost.models import TaskNetwork
from permafrost.strategies.base import Strategy


@dataclass(frozen=True)
class Joint(Strategy):
    """Train on the union of the tasks.

    Attributes
    ----------
    passes : int
        Epochs as a multiple of one task's: T shows each image T times as often as sequential
        learning does (the seed's choice), 1 takes equally many steps.
    """

    passes: int = 1

    name = "joint"
    sequential = False

    def view(self, network: TaskNetwork) -> nn.Module:
        """Return a classifier with one logit for every class, or for every shared output."""
        tasks = len(network.heads)
        return network.view("shared" if self.head == "shared" else "expanding", 0, tasks)

    def answer(self, logits: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Return the logits and labels of the run's own head.

        Parameters
        ----------
        logits : Tensor, shape (N, C) if shared, else (N, T * C)
            Of :meth:`view`.
        labels : Tensor, shape (N,)
            0 .. T * C - 1, as :func:`union` numbers them.
        classes : int
            C.
        """
        if self.head == "expanding":
            return logits, labels
        if self.head == "multi":  # each image is answered by its own task's head
            by_task = logits.unflatten(1, (-1, classes))
            logits = by_task[torch.arange(len(labels), device=labels.device), labels // classes]
        return logits, labels % classes


def union(tasks: tuple[Task, ...]) -> LabeledImages:
    """Return the training images of all tasks; task k's labels are offset by k * C."""
    classes = len(tasks[0].classes)
    return LabeledImages(
        torch.cat([task.train.images for task in tasks]),
        torch.cat([task.train.labels + index * classes for index, task in enumerate(tasks)]),
    )
