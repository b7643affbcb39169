"""What Python hands over: sequences of tasks, of tensors or a data set by its name; a picture."""

from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from permafrost.data.batches import normalize
from permafrost.data.datasets import load_dataset
from permafrost.data.image_folder import check_depth, read_image
from permafrost.data.images import ImageSize, LabeledImages, sides
from permafrost.data.tasks import Normalization, Task, TaskSequence, split_tasks, statistics
from permafrost.errors import InputError

# Training images and labels, test images and labels.
TaskTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def load_image(
    path: str | Path,
    size: ImageSize,
    mean: tuple[float, float, float] = (0, 0, 0),
    std: tuple[float, float, float] = (1, 1, 1),
) -> Tensor:
    """Read one picture as a network wants it: scaled, cropped and normalised.

    Parameters
    ----------
    path : str or Path
        JPEG, PNG, BMP, GIF, PPM, TIFF or WebP.
    size : int or (int, int)
        Side of the image, or height and width, in pixels; scaled until it covers them, and what
        sticks out is cropped.
    mean, std : tuple of three floats
        What values of 0..1 are normalised by; by default they stay.

    Returns
    -------
    Tensor
        float32 of shape (3, H, W).

    Raises
    ------
    InputError
        If the file is no image that can be read, or its 16 bits hold fewer.
    """
    try:
        pixels, peak = read_image(Path(path), sides(size))
        check_depth({} if peak is None else {Path(path): peak})
    except InputError as error:  # says of which parameter a folder's images are
        raise InputError(str(error).removeprefix("split.root: ")) from error
    return normalize(torch.from_numpy(pixels.copy()), Normalization(mean, std))


def tasks_from_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    image_size: ImageSize = 32,
    classes: Sequence[Sequence[str]] | None = None,
    classes_per_task: int = 5,
    tasks: int = 2,
    test_share: float = 0.25,
) -> TaskSequence:
    """Divide a data set's classes, in their order, among tasks.

    Parameters
    ----------
    name : str
        ``digits``, ``cifar10``, ``cifar100``, ``image_folder`` or a user's own,
        ``module:function``.
    root : str or Path, optional
        The folder of the data; for ``image_folder`` that of ``train/CLASS/*`` and, if there are
        test images, ``test/CLASS/*``.
    image_size : int or (int, int)
        Side of the images, or height and width, in pixels.
    classes : sequence of sequence of str, optional
        The names of each task's classes; the next two are not read then.
    classes_per_task, tasks : int
        How many, each at least 1.
    test_share : float
        Share of each class's images that is held out where the data set has no test part, between
        0 and 1.

    Returns
    -------
    TaskSequence
        Normalised by the first task's training images.

    Raises
    ------
    InputError
        If the data set cannot be used, or divided so.
    """
    return split_tasks(
        load_dataset(name, None if root is None else Path(root), image_size),
        classes=classes,
        classes_per_task=classes_per_task,
        tasks=tasks,
        selection="first",
        validation=0.0,
        test_share=test_share,
        seed=0,
    )


def tasks_from_tensors(
    tasks: Sequence[TaskTensors], classes: Sequence[Sequence[str]] | None = None
) -> TaskSequence:
    """Make a sequence of tasks of tensors.

    Parameters
    ----------
    tasks : sequence of (Tensor, Tensor, Tensor, Tensor)
        Of each task the training images, their labels, the test images and theirs. Images have the
        shape (N, 3, H, W), the same H and W in all tasks, and are uint8, 0..255, or floating-point,
        0..1, which are rounded to 255 levels. Labels are integers of shape (N,), 0..C-1, and each
        class of a task has a training image.
    classes : sequence of sequence of str, optional
        The names of each task's classes. By default they are numbered through all tasks: ``0``,
        ``1`` and so on.

    Returns
    -------
    TaskSequence
        Normalised by the first task's training images.

    Raises
    ------
    InputError
        One line that says which tensor cannot be used, and why.
    """
    if not tasks:
        raise InputError("tasks: there are none; wanted: at least one")
    parts = [_parts(index, tensors) for index, tensors in enumerate(tasks, start=1)]
    size = parts[0][0].images.shape[2:]
    for index, (train, test) in enumerate(parts, start=1):
        if not train.images.shape[2:] == test.images.shape[2:] == size:
            raise InputError(f"task {index}: its images are not all of task 1's size, {(*size,)}")
    names = _names([int(train.labels.max()) + 1 for train, _ in parts], classes)
    made = [
        Task(own, train, LabeledImages(train.images[:0], train.labels[:0]), test)
        for own, (train, test) in zip(names, parts, strict=True)
    ]
    return TaskSequence(tuple(made), statistics(made[0].train.images))


def _parts(index: int, tensors: TaskTensors) -> tuple[LabeledImages, LabeledImages]:
    if len(tensors) != 4:
        raise InputError(
            f"task {index}: {len(tensors)} tensors; wanted: training images, training labels, "
            "test images, test labels"
        )
    train = _part(f"task {index}, training", *tensors[:2])
    test = _part(f"task {index}, test", *tensors[2:])
    if len(train.labels.unique()) <= int(train.labels.max()):
        raise InputError(
            f"task {index}, training labels: a class below {int(train.labels.max())} has no image; "
            "wanted: labels 0..C-1 of C classes"
        )
    if test.labels.max() > train.labels.max():
        raise InputError(
            f"task {index}, test labels: {int(test.labels.max())} is no class of the training "
            f"images; allowed: 0..{int(train.labels.max())}"
        )
    return train, test


def _part(name: str, images: Tensor, labels: Tensor) -> LabeledImages:
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise InputError(
            f"{name}: {type(images).__name__} and {type(labels).__name__}; wanted: tensors"
        )
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise InputError(f"{name} images: shape {tuple(images.shape)}; wanted: (N, 3, H, W)")
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise InputError(
            f"{name} labels: {labels.dtype} of shape {tuple(labels.shape)}; wanted: integers of "
            f"shape ({len(images)},)"
        )
    labels = labels.cpu().to(torch.int64)
    if labels.min() < 0:
        raise InputError(f"{name} labels: {int(labels.min())}; allowed: from 0")
    return LabeledImages(_levels(name, images.detach().cpu()), labels)


def _levels(name: str, images: Tensor) -> Tensor:
    """Return images as uint8."""
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise InputError(f"{name} images: {images.dtype}; allowed: uint8, or floating-point 0..1")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError(f"{name} images: a value is not in 0..1; scale them, or pass uint8")
    return (images.float() * 255).round().to(torch.uint8)


def _names(sizes: Sequence[int], classes: Sequence[Sequence[str]] | None) -> list[tuple[str, ...]]:
    if classes is None:
        numbers = count()
        return [tuple(map(str, islice(numbers, size))) for size in sizes]
    if [len(names) for names in classes] != list(sizes):
        raise InputError(
            f"classes: names of {[len(names) for names in classes]} classes; the tasks have "
            f"{list(sizes)}"
        )
    return [tuple(names) for names in classes]
