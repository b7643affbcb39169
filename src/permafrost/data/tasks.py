"""The split of a data set into a sequence of tasks with disjoint classes."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from permafrost.data.images import ImageDataset, LabeledImages
from permafrost.errors import InputError

Selection = Literal["first", "random"]


@dataclass(frozen=True)
class Task:
    """One task.

    Parameters
    ----------
    classes : tuple of str
        The C names; label ``i`` of this task is ``classes[i]``.
    train, validation, test : LabeledImages
        Disjoint sets of images with labels 0..C-1; `validation` may be empty.
    flip, padding, epochs : bool or None, int or None, int or None
        How its images are augmented and for how many epochs it is trained, where not as all tasks.
    """

    classes: tuple[str, ...]
    train: LabeledImages
    validation: LabeledImages
    test: LabeledImages
    flip: bool | None = None
    padding: int | None = None
    epochs: int | None = None

    @property
    def training(self) -> dict[str, Any]:
        """Return what is its own of how it is trained."""
        own = {"flip": self.flip, "padding": self.padding, "epochs": self.epochs}
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, of images with values 0..1.

    Parameters
    ----------
    mean, std : tuple of float
        One number a channel; `std` is positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class TaskSequence:
    """Tasks in the order in which they are learned, and the normalisation that they share."""

    tasks: tuple[Task, ...]
    normalization: Normalization

    @property
    def image_size(self) -> tuple[int, int]:
        """Return height and width of the images, in pixels."""
        height, width = self.tasks[0].train.images.shape[2:]
        return height, width


def split_tasks(
    dataset: ImageDataset,
    *,
    classes: Sequence[Sequence[str]] | None = None,
    classes_per_task: int,
    tasks: int,
    selection: Selection,
    validation: float,
    test_share: float,
    seed: int,
) -> TaskSequence:
    """Divide a data set's classes among tasks, and each class's images among three parts.

    Which images of a class are held out depends on the data set and the shares alone, never on the
    seed or on the other classes: all seeds of an experiment keep the same images apart.

    Parameters
    ----------
    dataset : ImageDataset
        The data set.
    classes : sequence of sequence of str, optional
        The names of each task's classes, in the order of its labels. By default they are chosen by
        `classes_per_task`, `tasks` and `selection`, which are not read otherwise.
    classes_per_task : int
        Classes of each task, at least 1.
    tasks : int
        Number of tasks, at least 1.
    selection : {"first", "random"}
        Take the classes in label order, or in an order drawn with the seed.
    validation : float
        Share of each class's training images that is held out, 0 <= share < 1, rounded to whole
        images.
    test_share : float
        Where the data set has no test part, the share of each class's images that becomes it,
        0 < share < 1, rounded to whole images; what is left is the training images. Unused
        otherwise.
    seed : int
        Not negative; decides the classes of ``selection="random"`` and nothing else.

    Returns
    -------
    TaskSequence
        The tasks, and the statistics of the first task's training part.

    Raises
    ------
    InputError
        A parameter out of its range, more classes wanted than there are, a name that no class has
        or that is listed twice, or a class that would be left with fewer than 2 training images, no
        test image, or no validation image although `validation` is positive.
    """
    _check_parameters(classes_per_task, tasks, selection, validation, test_share)
    if classes is None:
        order = _class_order(len(dataset.class_names), classes_per_task * tasks, selection, seed)
        starts = range(0, len(order), classes_per_task)
        labels = [order[start : start + classes_per_task] for start in starts]
    else:
        labels = _named(dataset.class_names, classes)
    divided = tuple(_make_task(dataset, task, validation, test_share) for task in labels)
    return TaskSequence(divided, statistics(divided[0].train.images))


@dataclass(frozen=True)
class TaskFrom:
    """A task that is made of some classes of a data set.

    Attributes
    ----------
    dataset : ImageDataset
        The data set.
    classes : sequence of str
        Their names, in the order of the labels.
    flip, padding, epochs : bool or None, int or None, int or None
        As of :class:`Task`.
    """

    dataset: ImageDataset
    classes: Sequence[str]
    flip: bool | None = None
    padding: int | None = None
    epochs: int | None = None


def tasks_of(parts: Sequence[TaskFrom], *, validation: float, test_share: float) -> TaskSequence:
    """Make tasks of several data sets, all with images of the same size.

    Parameters
    ----------
    parts : sequence of TaskFrom
        One for each task.
    validation, test_share : float
        As for :func:`split_tasks`.

    Returns
    -------
    TaskSequence
        The tasks, and the statistics of the first task's training part, for all of them.

    Raises
    ------
    InputError
        As :func:`split_tasks`.
    """
    _check_parameters(1, 1, "first", validation, test_share)
    divided = []
    for part in parts:
        (labels,) = _named(part.dataset.class_names, [part.classes])
        task = _make_task(part.dataset, labels, validation, test_share)
        divided.append(replace(task, flip=part.flip, padding=part.padding, epochs=part.epochs))
    return TaskSequence(tuple(divided), statistics(divided[0].train.images))


def _check_parameters(
    classes_per_task: int, tasks: int, selection: str, validation: float, test_share: float
) -> None:
    checks = (
        ("classes_per_task", classes_per_task, classes_per_task >= 1, "at least 1"),
        ("tasks", tasks, tasks >= 1, "at least 1"),
        ("selection", selection, selection in ("first", "random"), "first, random"),
        ("validation", validation, 0 <= validation < 1, "0 <= share < 1"),
        ("test_share", test_share, 0 < test_share < 1, "0 < share < 1"),
    )
    for key, value, good, allowed in checks:
        if not good:
            raise InputError(f"split.{key}: is {value!r}; allowed: {allowed}")


def _class_order(available: int, wanted: int, selection: Selection, seed: int) -> list[int]:
    if wanted > available:
        raise InputError(
            f"split.classes_per_task: times split.tasks is {wanted} classes, "
            f"but the data set has {available}; allowed: at most {available}"
        )
    if selection == "first":
        return list(range(wanted))
    return _permutation(available, seed)[:wanted].tolist()


def _named(known: Sequence[str], classes: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the labels of classes that are given by their names."""
    wanted = [name for task in classes for name in task]
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0) or known
            raise InputError(
                f"split.classes: the data set has no class {name!r}; it has {len(known)}, such as "
                f"{', '.join(map(repr, close))}"
            )
        if wanted.count(name) > 1:
            raise InputError(f"split.classes: {name!r} stands twice; list each class once")
    return [[known.index(name) for name in task] for task in classes]


def _permutation(count: int, *key: int) -> np.ndarray:
    # RandomState, because NumPy promises that its stream never changes from version to version.
    return np.random.RandomState(np.random.MT19937(key)).permutation(count)


def _make_task(
    dataset: ImageDataset, classes: Sequence[int], validation: float, test_share: float
) -> Task:
    train, held_out, test = [], [], []
    for label in classes:
        own = _indices(dataset.train, label)
        own_test = None if dataset.test is None else _indices(dataset.test, label)
        if own_test is None:
            own_test, own = _draw(own, test_share, label, 0)
        own_validation, own = _draw(own, validation, label, 1)
        _check_counts(dataset.class_names[label], own, own_validation, own_test, validation)
        train.append(own)
        held_out.append(own_validation)
        test.append(own_test)
    return Task(
        tuple(dataset.class_names[label] for label in classes),
        _gather(dataset.train, train),
        _gather(dataset.train, held_out),
        _gather(dataset.test or dataset.train, test),
    )


def _indices(data: LabeledImages, label: int) -> np.ndarray:
    return np.flatnonzero(data.labels.numpy() == label)


def _draw(indices: np.ndarray, share: float, *key: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide a class's images into a drawn share and the rest, each in its old order."""
    count = int(len(indices) * share + 0.5)
    order = _permutation(len(indices), *key)
    return indices[np.sort(order[:count])], indices[np.sort(order[count:])]


def _check_counts(
    name: str, train: np.ndarray, held_out: np.ndarray, test: np.ndarray, validation: float
) -> None:
    if len(train) < 2 or len(test) < 1 or (validation > 0 and len(held_out) < 1):
        raise InputError(
            f"split.root: class {name!r} has too few images: {len(train)} for training, "
            f"{len(held_out)} for split.validation {validation}, {len(test)} for testing; "
            f"wanted: at least 2, {int(validation > 0)} and 1"
        )


def _gather(data: LabeledImages, classes: list[np.ndarray]) -> LabeledImages:
    """Collect the images of each class; the labels become the positions in `classes`."""
    counts = torch.tensor([len(indices) for indices in classes])
    images = data.images[torch.from_numpy(np.concatenate(classes))]
    return LabeledImages(images, torch.arange(len(classes)).repeat_interleave(counts))


def statistics(images: Tensor) -> Normalization:
    """Return the statistics over images and positions, of uint8 images (N, 3, H, W).

    The deviation is the population's. A channel that never changes has deviation 0, with which no
    image could be divided: it gets 1.
    """
    values = torch.arange(256, dtype=torch.float64)
    mean, std = [], []
    for channel in images.unbind(1):
        # Counted, since integers sum to the same on every machine and number of threads.
        share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
        centre = (share * values).sum()
        spread = (share * (values - centre) ** 2).sum().sqrt()
        mean.append(centre.item() / 255)
        std.append(spread.item() / 255 or 1.0)
    return Normalization(tuple(mean), tuple(std))
