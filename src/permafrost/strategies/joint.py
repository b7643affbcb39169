"""Joint training on all tasks at once, from the initial weights: the usual upper baseline.

The one-softmax form (an expanding head over all classes) is what the post compared with.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.data import Batches, LabeledImages, Task, TaskSequence
from permafrost.models import TaskNetwork
from permafrost.seeding import generator
from permafrost.strategies.base import Memory, Strategy, strategy
from permafrost.strategies.learner import Learner, OnEpoch, Progress
from permafrost.training import Batch, Objective, fit


@strategy("joint")
@dataclass(frozen=True)
class Joint(Strategy):
    """Train on the union of the tasks.

    Attributes
    ----------
    passes : int
        Epochs as a multiple of one task's: T shows each image T times as often as sequential
        learning does (the post's choice), 1 takes equally many steps.
    """

    passes: int = 1

    continues: ClassVar[bool] = False
    remark: ClassVar[str] = "sees all tasks at once"

    def learn(
        self,
        learner: Learner,
        network: TaskNetwork,
        progress: Progress,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """Learn all tasks at once; only the first and the last row of R exist.

        Raises
        ------
        TrainingDiverged
            As :func:`permafrost.training.fit`.
        """
        sequence = learner.sequence
        tasks = len(sequence.tasks)
        rows = fit(
            self.view(network),
            Batches(union(sequence.tasks), sequence.normalization, learner.device),
            replace(learner.config, epochs=self.passes * learner.config.epochs),
            generator=generator(learner.seed, "order", "joint"),
            objective=self.objective(network.classes_per_task),
            measure=lambda: learner.curve(network, tasks, self, {}),
            resume=progress.training,
            on_epoch=lambda _: on_epoch(progress) if on_epoch else None,
        )
        progress.history.extend({"task": tasks, "phase": "learn"} | row for row in rows)
        progress.seconds += progress.training.seconds
        progress.rows.extend([None] * (tasks - 1))
        learner.finish(progress, network, self, tasks)

    def memory_bytes(self, sequence: TaskSequence, memory: Memory) -> int:
        """Return the size of the earlier tasks' images."""
        del memory
        return sum(task.train.images.nbytes for task in sequence.tasks[:-1])

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
