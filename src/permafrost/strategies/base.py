"""What a strategy is: how a network learns its second and later tasks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from permafrost.data import Batches, TaskSequence
from permafrost.freezing import FilterMasks
from permafrost.models import Head, TaskNetwork
from permafrost.training import Objective, Observer, TrainingConfig, cross_entropy

# Given the network and the number of tasks it has learned, which filters to freeze next.
MaskSource = Callable[[TaskNetwork, int], FilterMasks]
# What a method keeps of the tasks it has learned, by name.
Memory = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """One training on the way to a learned task.

    Attributes
    ----------
    task : int
        Whose training images, 0 .. T - 1.
    epochs : int
        Passes over them.
    name : str
        ``learn``, or what else it is for; its random numbers depend on it.
    """

    task: int
    epochs: int
    name: str = "learn"


@dataclass(frozen=True)
class Keep:
    """How much the methods keep of each task.

    Attributes
    ----------
    fisher_images : int
        Of how many training images, drawn at random, the Fisher information is measured.
    buffer_images : int
        How many training images a replay buffer holds.
    """

    fisher_images: int = 500
    buffer_images: int = 50


@dataclass(frozen=True)
class Lesson:
    """What a strategy knows when a task is learned.

    Attributes
    ----------
    network : TaskNetwork
        In training, or about to be.
    learned : int
        0 .. T - 1 tasks learned before; the one that is learned now has this index.
    sequence : TaskSequence
        All tasks; their test images are for the learner alone.
    config : TrainingConfig
        How a task is trained.
    head : {"shared", "multi", "expanding"}
        How the network answers.
    seed : int
        Of all random draws.
    device : torch.device
        Where to compute.
    keep : Keep
        How much may be kept of each task.
    memory : dict of str to Tensor
        What the strategy keeps of the tasks before.
    start : dict of str to Tensor
        The network's weights when the phase under way began.
    """

    network: TaskNetwork
    learned: int
    sequence: TaskSequence
    config: TrainingConfig
    head: Head
    seed: int
    device: torch.device
    keep: Keep = Keep()
    memory: Memory = field(default_factory=dict)
    start: Memory = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        """Return whether no task follows the one that is learned now."""
        return self.learned + 1 == len(self.sequence.tasks)

    def batches(self, task: int) -> Batches:
        """Return the training images of a task."""
        return Batches(self.sequence.tasks[task].train, self.sequence.normalization, self.device)

    def view(self, task: int) -> nn.Sequential:
        """Return the classifier of a task, once the next one is learned."""
        return self.network.view(self.head, task, self.learned + 1)


@dataclass(frozen=True)
class Guard:
    """What differs from plain training while a task is learned.

    Attributes
    ----------
    objective : callable
        What is minimised.
    observer : Observer or None
        What watches the steps.
    """

    objective: Objective = cross_entropy
    observer: Observer | None = None


@dataclass(frozen=True)
class Strategy:
    """Plain fine-tuning, and the base of every other strategy.

    A strategy is a set of named hooks that the learner calls; each does here what fine-tuning
    does. It learns tasks 2..T one after the other from the first task's checkpoint.

    Attributes
    ----------
    head : {"shared", "multi", "expanding"}
        How the network answers.
    """

    head: Head

    name: ClassVar[str] = "finetune"
    # What it needs from the first task: a name in KNOWLEDGE.
    knowledge: ClassVar[str | None] = None
    # Its hyperparameters, each with its least and greatest value.
    hyper: ClassVar[dict[str, tuple[float, float]]] = {}
    # What sets it apart from the other methods, for the tables.
    remark: ClassVar[str] = ""

    def phases(self, lesson: Lesson) -> list[Phase]:
        """Return the trainings by which the next task is learned."""
        return [Phase(lesson.learned, lesson.config.epochs)]

    def while_learning(self, lesson: Lesson, phase: Phase) -> AbstractContextManager[Guard]:
        """Return a context that holds while a phase is trained.

        Parameters
        ----------
        lesson : Lesson
            The network holds the weights of the phase's start.
        phase : Phase
            Which training.
        """
        del lesson, phase
        return nullcontext(Guard())

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Return what is kept from now on; the network may be changed.

        Parameters
        ----------
        lesson : Lesson
            The network holds the weights of the phase's end, in plain layers.
        phase : Phase
            Which training ended.
        guard : Guard
            What held during it.
        """
        del phase, guard
        return lesson.memory

    def network_for(self, network: TaskNetwork, task: int, memory: Memory) -> TaskNetwork:
        """Return the network that answers for a task, to be measured."""
        del task, memory
        return network
