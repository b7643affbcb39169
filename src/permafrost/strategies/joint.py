"""Joint training on all tasks at once, from the initial weights: the usual upper baseline.

The one-softmax form (an expanding head over all classes) is what the seed compared with.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.data import LabeledImages, Task
from permafrost.models import TaskNetwork
from permafrost.strategies.base import Strategy
from permafrost.training import Batch, Objective


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

    name: ClassVar[str] = "joint"
    remark: ClassVar[str] = "sees all tasks at once"

    def view(self, network: TaskNetwork) -> nn.Module:
        """Return a classifier with one logit for every class, or for every shared output."""
        tasks = len(network.heads)
        return network.view("shared" if self.head == "shared" else "expanding", 0, tasks)

    def objective(self, classes: int) -> Objective:
        """Return the cross entropy under the run's own head.

        Parameters
        ----------
        classes : int
            C; labels are 0 .. T * C - 1, as :func:`union` numbers them.
        """

        def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            logits, labels = self._answer(model(batch.images), batch.labels, classes)
            return F.cross_entropy(logits, labels), logits, labels

        return cross_entropy

    def _answer(self, logits: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
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
