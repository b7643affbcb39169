"""The data sets by name; what each returns is checked."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from permafrost.data.images import (
    ImageDataset,
    ImageSize,
    LabeledImages,
    can_be_shown,
    sides,
)
from permafrost.errors import InputError, one_line
from permafrost.registry import Registry

# The files of a data set in a folder, each with what else of it counts: its name, its class.
Files = Callable[[Path], Iterator[tuple[list[str], Path]]]


class Reader(Protocol):
    """A function that reads a data set; see :func:`dataset`."""

    needs_root: bool
    files: Files | None

    def __call__(self, root: Any, image_size: Any, /) -> ImageDataset:
        """Read it."""


DATASETS: Registry[Reader] = Registry(
    "data set",
    "permafrost.data",
    lambda thing: callable(thing) and hasattr(thing, "needs_root"),
    "decorate the function with @dataset from permafrost.data",
)


def all_files(root: Path) -> Iterator[tuple[list[str], Path]]:
    """Yield all files in a folder, with their places in it."""
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield [str(path.relative_to(root))], path


def dataset(
    name: str, *, needs_root: bool = False, files: Files | None = all_files
) -> Callable[[Callable[[Any, Any], ImageDataset]], Reader]:
    """Make a data set of a function (root: Path or None, image_size) -> ImageDataset.

    The function returns the same at every call: it is called for every seed. `image_size` is a
    side in pixels, or (height, width) where they differ.

    Parameters
    ----------
    name : str
        Of a data set of the package. A user's own is found by its place, ``module:function``.
    needs_root : bool
        Whether it needs the folder ``split.root``; None is passed where none is given.
    files : callable or None
        The files in that folder by whose content the data set is watched, all by default; None
        where the function itself refuses files that are not the known ones.
    """

    def register(function: Callable[[Any, Any], ImageDataset]) -> Reader:
        reader = cast(Reader, function)
        reader.needs_root, reader.files = needs_root, files
        DATASETS.add(name, reader)
        return reader

    return register


def load_dataset(name: str, root: Path | None, image_size: ImageSize) -> ImageDataset:
    """Load a data set by its name.

    Parameters
    ----------
    name : str
        A key of `DATASETS`, described where it is defined: ``digits``, ``cifar10``, ``cifar100``,
        ``image_folder``; or a user's own, ``module:function``.
    root : Path or None
        The folder of the data.
    image_size : int or (int, int)
        Side of the images, or height and width, in pixels, at least 1. Images of another size are
        resized bilinearly (antialiased when they shrink).

    Returns
    -------
    ImageDataset
        Images of shape (N, 3, height, width).

    Raises
    ------
    InputError
        Unknown name, bad size, or data that is absent, altered, unreadable or laid out otherwise.
    """
    reader = DATASETS.find(name)
    height, width = sides(image_size)
    if min(height, width) < 1:
        raise InputError(f"split.image_size: is {image_size}; allowed: at least 1")
    if reader.needs_root:
        require_root(root)
    image_size = height if height == width else (height, width)
    found = _read(reader, name, root, image_size)
    for fault in _faults(found, (height, width)):
        raise InputError(f"data set '{name}': {fault}")
    return found


def require_root(root: Path | None) -> Path:
    """Return the data set's folder, or raise an InputError."""
    if root is None:
        raise InputError("split.root: is empty; this data set needs the folder of its files")
    if os.path.exists(root) and not os.path.isdir(root):  # a name that is too long is none
        raise InputError(f"split.root: {str(root)!r} is no folder; allowed: the data set's folder")
    return root


def _read(reader: Reader, name: str, root: Path | None, image_size: ImageSize) -> ImageDataset:
    try:
        return reader(root, image_size)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        if ":" in name:  # a user's own may fail in any way
            raise InputError(f"data set '{name}': failed ({one_line(error)})") from error
        if isinstance(error, OSError):  # a folder without rights, too long a path, a full disk
            raise InputError(
                f"split.root: {str(root)!r} cannot be used ({one_line(error)})"
            ) from error
        raise


def _faults(found: object, size: tuple[int, int]) -> Iterator[str]:
    """Yield what is wrong with what a data set has returned."""
    if not isinstance(found, ImageDataset):
        yield f"returns {type(found).__name__}; wanted: an ImageDataset"
        return
    names = found.class_names
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        yield "class_names must be a tuple of texts"
    for name in names:
        if not name or not can_be_shown(name):
            yield f"class_names: {name!r} is empty or has control characters"
        if names.count(name) > 1:
            yield f"class_names: {name!r} stands twice"
    yield from _faults_of_part(found.train, "train", len(names), size)
    if found.test is not None:
        yield from _faults_of_part(found.test, "test", len(names), size)


def _faults_of_part(part: object, name: str, classes: int, size: tuple[int, int]) -> Iterator[str]:
    if not isinstance(part, LabeledImages):
        yield f"{name} is {type(part).__name__}; wanted: LabeledImages"
        return
    images, labels = part.images, part.labels
    if not _is_tensor(images, torch.uint8, (3, *size)):
        yield (
            f"{name}.images: {_shown(images)}; wanted: uint8 of shape "
            f"(N, 3, {size[0]}, {size[1]}) on the CPU, as permafrost.data.resize makes them"
        )
    if not _is_tensor(labels, torch.int64, ()) or len(labels) != len(images):
        yield f"{name}.labels: {_shown(labels)}; wanted: int64 of shape ({len(images)},) on the CPU"
    if not len(labels):
        yield f"{name}: has no images"
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        yield (
            f"{name}.labels: lie in {int(labels.min())}..{int(labels.max())}; allowed with "
            f"{classes} class_names: 0..{classes - 1}"
        )


def _is_tensor(value: object, dtype: torch.dtype, shape_of_one: tuple[int, ...]) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype == dtype
        and value.ndim == 1 + len(shape_of_one)
        and value.shape[1:] == shape_of_one
        and value.device.type == "cpu"
    )


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = str(value.dtype).removeprefix("torch.")
    return f"{kind} of shape {tuple(value.shape)} on {value.device}"
