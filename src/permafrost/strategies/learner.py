"""Learn a sequence of tasks with a strategy and fill the accuracy matrix R."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from permafrost.data import Batches, TaskSequence
from permafrost.evaluation import Accuracy, accuracy_row
from permafrost.models import Head, TaskNetwork
from permafrost.seeding import generator
from permafrost.strategies.base import Strategy
from permafrost.strategies.joint import Joint, union
from permafrost.training import TrainingConfig, TrainingState, fit


@dataclass
class Progress:
    """Where a sequence of trainings stands; all that is needed to go on.

    Attributes
    ----------
    learned : int
        Tasks learned so far.
    rows : list
        The rows of R so far, each a list of :class:`Accuracy` or None, or None for a row that the
        strategy does not have.
    training : TrainingState
        Of the task under way.
    start : dict of str to Tensor
        The network's weights when the task under way began.
    history : list of dict
        A row for each finished epoch of finished tasks.
    """

    learned: int
    rows: list[list[Accuracy | None] | None]
    start: dict[str, Tensor] = field(default_factory=dict)
    training: TrainingState = field(default_factory=TrainingState)
    history: list[dict[str, Any]] = field(default_factory=list)


OnEpoch = Callable[[Progress], None]


class Learner:
    """Trains a network on tasks, and measures it on all of them.

    Parameters
    ----------
    sequence : TaskSequence
        The tasks.
    config : TrainingConfig
        How each task is trained.
    head : {"shared", "multi", "expanding"}
        How the network answers.
    seed : int
        Sets the order of the data and its augmentation.
    device : torch.device
        Where to train; the images are moved there once.
    curve_tasks : int, optional
        Of how many tasks the accuracy is measured after each epoch; all by default.
    """

    def __init__(
        self,
        sequence: TaskSequence,
        config: TrainingConfig,
        *,
        head: Head,
        seed: int,
        device: torch.device,
        curve_tasks: int | None = None,
    ) -> None:
        self.sequence = sequence
        self.config = config
        self.head: Head = head
        self.seed = seed
        self.device = device
        self.tests = [Batches(task.test, sequence.normalization, device) for task in sequence.tasks]
        self.curve_tasks = curve_tasks or len(self.tests)

    def measure(self, network: TaskNetwork, seen: int) -> list[Accuracy | None]:
        """Return row ``seen`` of R."""
        return accuracy_row(network, self.tests, self.head, seen)

    def learn_task(
        self,
        network: TaskNetwork,
        strategy: Strategy,
        progress: Progress,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """Learn the next task; ``progress`` moves on by one task and one row of R."""
        task = progress.learned
        seen = task + 1
        if progress.training.epoch == 0:
            progress.start = copy.deepcopy(network.state_dict())
        else:  # masks and stand-in layers are made of the weights that the task began with
            network.load_state_dict(progress.start)
        train = self.sequence.tasks[task].train
        if self.head == "expanding":
            train = replace(train, labels=train.labels + network.label_offset(self.head, task))
        with strategy.while_learning(network, task):
            rows = fit(
                network.view(self.head, task, seen),
                Batches(train, self.sequence.normalization, self.device),
                self.config,
                generator=generator(self.seed, "order", task),
                measure=lambda: self._curve(network, seen),
                resume=progress.training,
                on_epoch=lambda _: on_epoch(progress) if on_epoch else None,
            )
        self._finish(progress, network, seen, rows)

    def learn_jointly(
        self,
        network: TaskNetwork,
        strategy: Joint,
        progress: Progress,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """Learn all tasks at once; only the first and the last row of R exist."""
        tasks = len(self.sequence.tasks)
        classes = network.classes_per_task
        rows = fit(
            strategy.view(network),
            Batches(union(self.sequence.tasks), self.sequence.normalization, self.device),
            replace(self.config, epochs=strategy.passes * self.config.epochs),
            generator=generator(self.seed, "order", "joint"),
            answer=lambda logits, labels: strategy.answer(logits, labels, classes),
            measure=lambda: self._curve(network, tasks),
            resume=progress.training,
            on_epoch=lambda _: on_epoch(progress) if on_epoch else None,
        )
        progress.rows.extend([None] * (tasks - 1))
        self._finish(progress, network, tasks, rows)

    def _curve(self, network: TaskNetwork, seen: int) -> dict[str, float]:
        return {
            f"acc_task{index + 1}": accuracy.overall
            for index, accuracy in enumerate(
                accuracy_row(network, self.tests[: self.curve_tasks], self.head, seen)
            )
            if accuracy is not None
        }

    def _finish(
        self, progress: Progress, network: TaskNetwork, seen: int, rows: list[dict[str, Any]]
    ) -> None:
        progress.history.extend({"task": seen} | row for row in rows)
        progress.rows.append(self.measure(network, seen))
        progress.learned = seen
        progress.training = TrainingState()
