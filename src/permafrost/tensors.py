"""Tensors and tasks on disk, in the formats of :mod:`permafrost.artifacts`."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from permafrost.artifacts import (
    HEADER,
    REBUILD,
    Entry,
    read_tensors,
    tensors_header,
    write_atomically,
)
from permafrost.data import LabeledImages, Normalization, Task, TaskSequence
from permafrost.errors import InputError

_PARTS = ("train", "validation", "test")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Any = None) -> None:
    """Write tensors as safetensors.

    Parameters
    ----------
    path : Path
        Where to.
    tensors : mapping of str to Tensor
        By name; moved to the CPU.
    about : object, optional
        Anything JSON can hold, kept in the header.
    """
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: safetensors writes several in a random order.
    metadata = {HEADER: tensors_header(map(_entry, dense, dense.values()), about)}
    write_atomically(path, serialise(dense, metadata=metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_tensors` wrote; raise as :func:`read_tensors`."""
    return read_tensors(path, "pt", _entry)


def _entry(name: str, tensor: Tensor) -> Entry:
    content = tensor.reshape(-1).view(torch.uint8).numpy().data  # bfloat16 is no type of NumPy
    return name, str(tensor.dtype), list(tensor.shape), content


def load_state(path: Path, module: torch.nn.Module) -> None:
    """Load saved weights into a network of the same structure.

    Raises
    ------
    InputError
        If the file is damaged or holds another network.
    """
    tensors, _ = load_tensors(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError:
        raise InputError(
            f"{path}: holds another network than params.yaml describes; run `dvc repro`"
        ) from None


def save_tasks(path: Path, sequence: TaskSequence) -> None:
    """Write a sequence of tasks: images, labels, classes and normalisation."""
    tensors = {}
    for index, task in enumerate(sequence.tasks):
        for part in _PARTS:
            images: LabeledImages = getattr(task, part)
            tensors[f"{index}/{part}/images"] = images.images
            tensors[f"{index}/{part}/labels"] = images.labels
    own = [task.training for task in sequence.tasks]
    save_tensors(
        path,
        tensors,
        ({"training": own} if any(own) else {})
        | {
            "classes": [list(task.classes) for task in sequence.tasks],
            "mean": list(sequence.normalization.mean),
            "std": list(sequence.normalization.std),
        },
    )


def load_tasks(path: Path) -> TaskSequence:
    """Read what :func:`save_tasks` wrote.

    Raises
    ------
    InputError
        If the file is damaged or holds something else.
    """
    tensors, about = load_tensors(path)
    try:
        if "augmentation" in about:
            raise ValueError("of a version that knew no epochs of a task's own")
        tasks = tuple(
            replace(_task(tensors, index, tuple(classes)), **own)
            for index, (classes, own) in enumerate(
                zip(about["classes"], about.get("training", repeat({})), strict=False)
            )
        )
        return TaskSequence(tasks, Normalization(tuple(about["mean"]), tuple(about["std"])))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: holds no tasks; {REBUILD}") from None


def _task(tensors: Mapping[str, Tensor], index: int, classes: tuple[str, ...]) -> Task:
    parts = {}
    for part in _PARTS:
        images, labels = (tensors[f"{index}/{part}/{name}"] for name in ("images", "labels"))
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError("not a task's images")
        if len(labels) and not (0 <= int(labels.min()) <= int(labels.max()) < len(classes)):
            raise ValueError("not a task's labels")
        parts[part] = LabeledImages(images, labels)
    return Task(classes, parts["train"], parts["validation"], parts["test"])
