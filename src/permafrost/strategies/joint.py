"""Joint training on all tasks at once, from the initial weights: the usual upper baseline.

The one-softmax form (an expanding head over all classes) is what the post compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.data import Batches, LabeledImages, Task, TaskSequence
from permafrost.models import TaskNetwork
from permafrost.seeding import generator
from permafrost.strategies.base import Memory, Strategy, strategy
from permafrost.strategies.learner import Learner, OnEpoch, Progress
from permafrost.training import Batch, Objective, TrainingConfig, fit, recordable


@strategy("joint")
@dataclass(frozen=True)
class Joint(Strategy):
    """Train on the union of the tasks; augmented as suits all of them.

    Attributes
    ----------
    passes : int
        Epochs as a multiple of one task's, or of the tasks' mean: T is the sum of the tasks'
        epochs, which shows each image T times as often as sequential learning does (the post's
        choice), 1 takes equally many steps.
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
        epochs = [task.epochs or learner.config.epochs for task in sequence.tasks]
        rows = fit(
            self.view(network),
            Batches(union(sequence.tasks), sequence.normalization, learner.device),
            replace(
                learner.config,
                epochs=round(self.passes * fmean(epochs)),
                **_common(learner.config, sequence.tasks),
            ),
            generator=generator(learner.seed, "order", "joint"),
            objective=self.objective(network.classes, learner.device),
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

    def objective(self, classes: Sequence[int], device: torch.device) -> Objective:
        """Return the cross entropy under the run's own head.

        Parameters
        ----------
        classes : sequence of int
            How many each task has; labels are as :func:`union` numbers them.
        device : torch.device
            Where to compute.
        """
        starts = torch.tensor(_starts(classes), device=device)

        @recordable
        def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            logits, labels = self._answer(model(batch.images), batch.labels, classes, starts)
            return F.cross_entropy(logits, labels), logits, labels

        return cross_entropy

    def _answer(
        self, logits: Tensor, labels: Tensor, classes: Sequence[int], starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.head == "expanding":
            return logits, labels
        task = torch.bucketize(labels, starts, right=True) - 1
        if self.head == "multi":  # each image is answered by its own task's head
            parts = logits.split(list(classes), dim=1)
            by_task = torch.stack([_padded(part, max(classes)) for part in parts])
            # Not by an index, whose gradient takes a GPU long where it has to be deterministic.
            mine = torch.arange(len(classes), device=labels.device)[:, None] == task
            logits = by_task.where(mine[..., None], 0).sum(0)
        return logits, labels - starts[task]


def union(tasks: tuple[Task, ...]) -> LabeledImages:
    """Return the training images of all tasks; a task's labels follow those of the one before."""
    starts = _starts([len(task.classes) for task in tasks])
    return LabeledImages(
        torch.cat([task.train.images for task in tasks]),
        torch.cat([task.train.labels + start for task, start in zip(tasks, starts, strict=True)]),
    )


def _common(config: TrainingConfig, tasks: tuple[Task, ...]) -> dict[str, Any]:
    """Return the augmentation that suits the images of all tasks: flips only where all are."""
    own = [replace(config, **task.training) for task in tasks]
    return {"flip": all(c.flip for c in own), "padding": min(c.padding for c in own)}


def _starts(classes: Sequence[int]) -> list[int]:
    """Return the first label of each task."""
    return [0, *accumulate(classes)][: len(classes)]


def _padded(logits: Tensor, classes: int) -> Tensor:
    """Widen logits (N, C) to (N, classes) by classes that are never answered."""
    least = torch.finfo(logits.dtype).min
    return F.pad(logits, (0, classes - logits.shape[1]), value=least)
