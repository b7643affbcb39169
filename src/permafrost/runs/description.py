"""What a network's weights are of: stored with them, so that they answer without a project."""

from __future__ import annotations

from dataclasses import dataclass

from permafrost.data import TaskSequence
from permafrost.models import Head
from permafrost.runs.spec import Settings
from permafrost.strategies.base import Strategy


@dataclass(frozen=True)
class Description:
    """All by which a trained network is built, and its answers are read.

    Nothing in it differs from one run of a training to the next: neither a time nor a place.

    Attributes
    ----------
    arch : str
        Of the network, as in :class:`Settings`.
    width : float
        Factor on its filters.
    batch_norm : bool
        Whether it has BatchNorms.
    image_size : (int, int)
        Height and width of its images, in pixels.
    classes : list of list of str
        The names of each task's classes, of all tasks, learned or not: each has a head.
    mean, std : list of float
        Of the channels, by which images with values 0..1 are normalised.
    head : {"shared", "multi", "expanding"}
        How it answers.
    learned : int
        How many tasks it has learned.
    strategy : str or None
        The class of the strategy by which; None where only the first task is learned, plainly.
    needs_memory : bool
        Whether it answers only with what the strategy keeps besides.
    """

    arch: str
    width: float
    batch_norm: bool
    image_size: tuple[int, int]
    classes: list[list[str]]
    mean: list[float]
    std: list[float]
    head: Head
    learned: int
    strategy: str | None
    needs_memory: bool

    @classmethod
    def of(
        cls,
        settings: Settings,
        tasks: TaskSequence,
        *,
        learned: int,
        head: Head = "shared",
        strategy: type[Strategy] | None = None,
    ) -> Description:
        """Describe a network of a training; of the first task's by default."""
        return cls(
            arch=settings.arch,
            width=settings.width,
            batch_norm=settings.batch_norm,
            image_size=tasks.image_size,
            classes=[list(task.classes) for task in tasks.tasks],
            mean=list(tasks.normalization.mean),
            std=list(tasks.normalization.std),
            head=head,
            learned=learned,
            strategy=None if strategy is None else strategy.__name__,
            needs_memory=strategy is not None and strategy.needs_memory(),
        )
