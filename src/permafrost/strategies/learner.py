"""Learn a sequence of tasks with a strategy and fill the accuracy matrix R."""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from permafrost.data import Batches, TaskSequence
from permafrost.errors import NotFiniteError
from permafrost.evaluation import Accuracy, accuracy_name
from permafrost.evaluation.accuracy import accuracy_row, row_without_task
from permafrost.models import Head, TaskNetwork
from permafrost.seeding import generator
from permafrost.strategies.base import Keep, Lesson, Memory, Phase, Strategy
from permafrost.training import TrainingConfig, TrainingDiverged, TrainingState, fit


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
        A row for each epoch of the trainings that are finished.
    memory : dict of str to Tensor
        What the strategy keeps of the tasks before.
    phase : int
        How many of the task's trainings are finished.
    seconds : float
        How long the finished trainings took, without measuring.
    """

    learned: int
    rows: list[list[Accuracy | None] | None]
    start: dict[str, Tensor] = field(default_factory=dict)
    training: TrainingState = field(default_factory=TrainingState)
    history: list[dict[str, Any]] = field(default_factory=list)
    memory: Memory = field(default_factory=dict)
    phase: int = 0
    seconds: float = 0.0


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
    keep : Keep, optional
        How much a strategy may keep of each task.
    untrained : dict of str to Tensor, optional
        The weights that the network began with.
    """

    def __init__(
        self,
        sequence: TaskSequence,
        config: TrainingConfig,
        *,
        head: Head,
        seed: int,
        device: torch.device,
        keep: Keep = Keep(),  # noqa: B008  (frozen)
        untrained: Memory | None = None,
    ) -> None:
        self.sequence = sequence
        self.config = config
        self.head: Head = head
        self.seed = seed
        self.device = device
        self.keep = keep
        self.untrained = untrained or {}
        self.tests = [Batches(task.test, sequence.normalization, device) for task in sequence.tasks]

    def measure(
        self,
        network: TaskNetwork,
        seen: int,
        strategy: Strategy | None = None,
        memory: Memory | None = None,
    ) -> list[Accuracy | None]:
        """Return row ``seen`` of R.

        Parameters
        ----------
        network : TaskNetwork
            After learning ``seen`` tasks.
        seen : int
            0 .. T.
        strategy : Strategy, optional
            Decides which weights answer for a task.
        memory : dict of str to Tensor, optional
            What the strategy keeps.
        """
        networks = self._answering(network, strategy, memory)
        return accuracy_row(networks, self.tests, self.head, seen)

    def measure_without_task(
        self, network: TaskNetwork, strategy: Strategy, memory: Memory
    ) -> list[Accuracy] | None:
        """Return the accuracies at the end where the task is not told; see `row_without_task`."""
        return row_without_task(self._answering(network, strategy, memory), self.tests, self.head)

    def _answering(
        self, network: TaskNetwork, strategy: Strategy | None, memory: Memory | None
    ) -> list[TaskNetwork]:
        """Return the network that answers for each task."""
        return [
            strategy.network_for(network, task, memory or {}) if strategy else network
            for task in range(len(self.tests))
        ]

    def learn_task(
        self,
        network: TaskNetwork,
        strategy: Strategy,
        progress: Progress,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """Learn the next task; ``progress`` moves on by one task and one row of R.

        Raises
        ------
        TrainingDiverged
            If one of the task's trainings diverges, or what the strategy makes of it is not finite;
            names the task and the training.
        """
        lesson = self._lesson(network, progress)
        plainly = [Phase(0, lesson.epochs(0))]
        phases = strategy.phases(lesson) if progress.learned else plainly
        while progress.phase < len(phases):
            phase = phases[progress.phase]
            try:
                self._train_phase(network, strategy, phase, progress, on_epoch)
            except NotFiniteError as error:
                where = f"task {progress.learned + 1}"
                where += "" if phase.name == "learn" else f", {phase.name}"
                raise TrainingDiverged(f"{where}: {error}") from error
        self.finish(progress, network, strategy, progress.learned + 1)

    def _train_phase(
        self,
        network: TaskNetwork,
        strategy: Strategy,
        phase: Phase,
        progress: Progress,
        on_epoch: OnEpoch | None,
    ) -> None:
        seen = progress.learned + 1
        if progress.training.epoch == 0:
            progress.start = copy.deepcopy(network.state_dict())
        else:  # masks and stand-in layers are made of the weights that the training began with
            network.load_state_dict(progress.start)
        lesson = self._lesson(network, progress)
        task = self.sequence.tasks[phase.task]
        train, own = task.train, task.training
        if self.head == "expanding":
            offset = network.label_offset(self.head, phase.task)
            train = replace(train, labels=train.labels + offset)
        tasks = strategy.measured(lesson, phase)
        purpose: list[int | str] = [self.seed, "order", progress.learned]
        purpose += [] if phase.name == "learn" else [phase.name]
        is_first = progress.learned == 0
        holding = (
            strategy.while_learning_first(lesson)
            if is_first
            else strategy.while_learning(lesson, phase)
        )
        with holding as guard:
            rows = fit(
                lesson.view(phase.task),
                Batches(train, self.sequence.normalization, self.device),
                replace(self.config, **own | {"epochs": phase.epochs}),
                generator=generator(*purpose),
                objective=guard.objective,
                observer=guard.observer,
                draw=guard.draw,
                measure=lambda: self.curve(network, seen, strategy, progress.memory, tasks),
                resume=progress.training,
                on_epoch=lambda _: on_epoch(progress) if on_epoch else None,
            )
        progress.memory = (
            strategy.after_first(lesson, guard)
            if is_first
            else strategy.after_phase(lesson, phase, guard)
        )
        progress.history.extend({"task": seen, "phase": phase.name} | row for row in rows)
        progress.seconds += progress.training.seconds
        progress.training = TrainingState()
        progress.phase += 1

    def _lesson(self, network: TaskNetwork, progress: Progress) -> Lesson:
        return Lesson(
            network=network,
            learned=progress.learned,
            sequence=self.sequence,
            config=self.config,
            head=self.head,
            seed=self.seed,
            device=self.device,
            keep=self.keep,
            memory=progress.memory,
            start=progress.start,
            untrained=self.untrained,
        )

    def curve(
        self,
        network: TaskNetwork,
        seen: int,
        strategy: Strategy,
        memory: Memory,
        tasks: Collection[int] | None = None,
    ) -> dict[str, float]:
        """Return the accuracies that are measured after an epoch, by :func:`accuracy_name`."""
        networks = self._answering(network, strategy, memory)
        return {
            accuracy_name(index): accuracy.overall
            for index, accuracy in enumerate(
                accuracy_row(networks, self.tests, self.head, seen, tasks)
            )
            if accuracy is not None
        }

    def finish(
        self, progress: Progress, network: TaskNetwork, strategy: Strategy, seen: int
    ) -> None:
        """Measure the network that has learned `seen` tasks: the next row of R."""
        progress.rows.append(self.measure(network, seen, strategy, progress.memory))
        progress.learned = seen
        progress.training = TrainingState()
        progress.phase = 0
