"""What a strategy is: how a network learns its second and later tasks."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from permafrost.data import Batches, TaskSequence
from permafrost.freezing import BatchNormFreeze, FilterMasks
from permafrost.hyper import Allowed, Value
from permafrost.models import Head, TaskNetwork
from permafrost.registry import Registry
from permafrost.training import Draw, Objective, Observer, TrainingConfig, cross_entropy

if TYPE_CHECKING:
    from permafrost.strategies.learner import Learner, OnEpoch, Progress

S = TypeVar("S", bound="Strategy")
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
    untrained : dict of str to Tensor
        Its weights before it had learned anything.
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
    untrained: Memory = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        """Return whether no task follows the one that is learned now."""
        return self.learned + 1 == len(self.sequence.tasks)

    def epochs(self, task: int) -> int:
        """Return for how many epochs a task is trained."""
        return self.sequence.tasks[task].epochs or self.config.epochs

    def batches(self, task: int) -> Batches:
        """Return the training images of a task."""
        return Batches(self.sequence.tasks[task].train, self.sequence.normalization, self.device)

    def view(self, task: int) -> nn.Sequential:
        """Return the classifier of a task, once the next one is learned."""
        return self.network.view(self.head, task, self.learned + 1)


# Given the lesson and the filters that are frozen already, which are to be frozen in it.
MaskSource = Callable[[Lesson, FilterMasks], FilterMasks]


class FilterRanking(Protocol):
    """What a criterion says of the filters of the network that has just learned a task."""

    def __call__(self, lesson: Lesson, frozen: FilterMasks, /) -> FilterMasks:
        """Return the filters that are frozen, with those that are already."""
        ...

    def orders(self, lesson: Lesson, *, by_chance: bool = False) -> dict[str, Tensor]:
        """Return each layer's filters, the best first; or as chance has them."""
        ...


@dataclass(frozen=True)
class Guard:
    """What differs from plain training while a task is learned.

    Attributes
    ----------
    objective : callable
        What is minimised; a GPU records a step with it if
        :func:`permafrost.training.recordable` says that it may.
    observer : Observer or None
        What watches the steps.
    draw : callable or None
        Given a batch, what the objective needs for it besides, as ``batch.drawn``: the same shapes
        for batches of the same size.
    chosen : dict of str to Tensor
        What was decided as the training began, for :meth:`Strategy.after_phase`.
    """

    objective: Objective = cross_entropy
    observer: Observer | None = None
    draw: Draw | None = None
    chosen: Memory = field(default_factory=dict)


@dataclass(frozen=True)
class Strategy:
    """Plain fine-tuning, and the base of every other strategy.

    A strategy is a set of named hooks that the learner calls; each does here what fine-tuning
    does. The first task is learned plainly, so that all strategies can go on from one checkpoint.

    Attributes
    ----------
    head : {"shared", "multi", "expanding"}
        How the network answers.
    twin : str or None
        What takes the explanation's place; one of its ``twins``.
    """

    head: Head
    twin: str | None = field(default=None, kw_only=True)

    # What it needs from the first task: makes it of the lesson that was learned. A strategy and
    # one that builds on it share it by its name.
    knowledge: ClassVar[Callable[[Lesson], Memory] | None] = None
    # Its hyperparameters, fields with a default, each with its bounds or words.
    hyper: ClassVar[dict[str, Allowed]] = {}
    # Whether it freezes filters that a criterion ranks: it then has a share, `pct`.
    freezes_ranked: ClassVar[bool] = False
    # Whether a criterion ranks its filters while it has no such share.
    ranks: ClassVar[bool] = False
    # Whether it goes on from the first task's weights, or from the initial ones.
    continues: ClassVar[bool] = True
    # The heads under which it can answer.
    heads: ClassVar[tuple[Head, ...]] = ("shared", "multi", "expanding")
    # What its controls put in the place of the explanation that it uses.
    twins: ClassVar[tuple[str, ...]] = ()
    # The hyperparameter that is 0 where it uses none, if there is one.
    explained_by: ClassVar[str | None] = None
    # What a step takes, in units of a plain one, roughly: only to tell it beforehand.
    step_cost: ClassVar[float] = 1.0
    # What sets it apart from the other methods, for the tables.
    remark: ClassVar[str] = ""

    @classmethod
    def defaults(cls) -> dict[str, Value]:
        """Return the hyperparameters' defaults."""
        defaults = {entry.name: entry.default for entry in fields(cls) if entry.name in cls.hyper}
        return cast(dict[str, Value], defaults)

    @classmethod
    def build(
        cls,
        head: Head,
        hyper: Mapping[str, Value],
        masks: FilterRanking,
        batch_norm: BatchNormFreeze,
    ) -> Self:
        """Make the strategy of what parameters say.

        A field ``ranking`` is given the ranking, a field ``batch_norm`` what is frozen of a norm.

        Parameters
        ----------
        head : {"shared", "multi", "expanding"}
            How the network answers.
        hyper : mapping of str to float or str
            The hyperparameters, but for the share of ranked filters.
        masks : callable
            The ranked filters to freeze, and their order.
        batch_norm : {"full", "affine", "none"}
            What is frozen of a frozen filter's BatchNorm.
        """
        given = {"ranking": masks, "batch_norm": batch_norm}
        about = {name: given[name] for name in cls.built_of()}
        return cls(head, **cast(dict[str, Any], hyper), **cast(dict[str, Any], about))

    @classmethod
    def built_of(cls) -> set[str]:
        """Return what it is built of besides its hyperparameters: ``ranking``, ``batch_norm``."""
        return {entry.name for entry in fields(cls)} & {"ranking", "batch_norm"}

    def as_twin(self, twin: str) -> Self:
        """Return the control in which something else takes the explanation's place.

        Parameters
        ----------
        twin : str
            One of ``twins``.
        """
        return replace(self, twin=twin)

    @classmethod
    def controls(cls, hyper: Mapping[str, Value]) -> tuple[str, ...]:
        """Return which of its twins are controls of it with these hyperparameters."""
        is_used = cls.explained_by is None or hyper[cls.explained_by]
        return cls.twins if is_used else ()

    def while_learning_first(self, lesson: Lesson) -> AbstractContextManager[Guard]:
        """Return a context that holds while the first task is learned."""
        del lesson
        return nullcontext(Guard())

    def after_first(self, lesson: Lesson, guard: Guard) -> Memory:
        """Return what is kept of the first task."""
        del guard
        make = type(self).knowledge
        return make(lesson) if make else {}

    def phases(self, lesson: Lesson) -> list[Phase]:
        """Return the trainings by which a further task is learned."""
        return [Phase(lesson.learned, lesson.epochs(lesson.learned))]

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

    def measured(self, lesson: Lesson, phase: Phase) -> Collection[int]:
        """Return the tasks that can be measured while a phase is trained."""
        del phase
        return range(len(lesson.sequence.tasks))

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

    def learn(
        self,
        learner: "Learner",
        network: TaskNetwork,
        progress: "Progress",
        on_epoch: "OnEpoch | None" = None,
    ) -> None:
        """Learn all tasks that are not learned yet, one after the other.

        Parameters
        ----------
        learner : Learner
            Trains and measures.
        network : TaskNetwork
            Holds the weights after the tasks that are learned.
        progress : Progress
            Where it stands; moves on.
        on_epoch : callable, optional
            Told the progress after each epoch.
        """
        while progress.learned < len(learner.sequence.tasks):
            learner.learn_task(network, self, progress, on_epoch)

    def network_for(self, network: TaskNetwork, task: int, memory: Memory) -> TaskNetwork:
        """Return the network that answers for a task, to be measured."""
        del task, memory
        return network

    @classmethod
    def needs_memory(cls) -> bool:
        """Return whether the network answers only with what the strategy keeps."""
        return cls.network_for is not Strategy.network_for

    def frozen(self, network: TaskNetwork, memory: Memory) -> dict[str, Tensor]:
        """Return the filters that were frozen while the last task was learned, by layer.

        Returns
        -------
        dict of str to Tensor of bool, shape (F,)
            Layers without a frozen filter may be left out.
        """
        del network, memory
        return {}

    def memory_bytes(self, sequence: TaskSequence, memory: Memory) -> int:
        """Return how much is kept besides the network while the last task is learned."""
        del sequence
        return sum(tensor.nbytes for tensor in memory.values())


def part_with(memory: Memory, prefix: str) -> Memory:
    """Return the entries whose names begin with a prefix."""
    return {name: value for name, value in memory.items() if name.startswith(prefix)}


def _is_strategy(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Strategy)


STRATEGIES: Registry[type[Strategy]] = Registry(
    "strategy", "permafrost.strategies", _is_strategy, "make it a subclass of Strategy"
)


def strategy(name: str) -> Callable[[type[S]], type[S]]:
    """Register a strategy of this package.

    A user's own needs no name: it is ``module:Class``.
    """

    def register(made: type[S]) -> type[S]:
        STRATEGIES.add(name, made)
        return made

    return register
