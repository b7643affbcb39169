"""The formats on disk: safetensors and JSON, written whole or not at all, checked when read."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from permafrost.data import LabeledImages, Normalization, Task, TaskSequence
from permafrost.errors import InputError

_PARTS = ("train", "validation", "test")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, through a crash too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def load_json(path: Path) -> Any:
    """Read JSON.

    Raises
    ------
    InputError
        If the file is missing or is no valid JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run the stage that writes it (dvc repro)") from None
    except ValueError:
        raise InputError(f"{path}: is no valid JSON; {_REBUILD}") from None


_REBUILD = "it is damaged: delete it and run `dvc repro` again"


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
    header = {"about": json.dumps(about, sort_keys=True)}
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = serialise(dense, metadata=header)
    write_atomically(path, content)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_tensors` wrote: the tensors and ``about``.

    Raises
    ------
    InputError
        If the file is missing, cut short or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run the stage that writes it (dvc repro)") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: {error}; {_REBUILD}") from None


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


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tasks(path: Path, sequence: TaskSequence) -> None:
    """Write a sequence of tasks: images, labels, classes and normalisation."""
    tensors = {}
    for index, task in enumerate(sequence.tasks):
        for part in _PARTS:
            images: LabeledImages = getattr(task, part)
            tensors[f"{index}/{part}/images"] = images.images
            tensors[f"{index}/{part}/labels"] = images.labels
    save_tensors(
        path,
        tensors,
        {
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
        tasks = tuple(
            _task(tensors, index, tuple(classes)) for index, classes in enumerate(about["classes"])
        )
        return TaskSequence(tasks, Normalization(tuple(about["mean"]), tuple(about["std"])))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: holds no tasks; {_REBUILD}") from None


def _task(tensors: Mapping[str, Tensor], index: int, classes: tuple[str, ...]) -> Task:
    parts = {}
    for part in _PARTS:
        images, labels = (tensors[f"{index}/{part}/{name}"] for name in ("images", "labels"))
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError("not a task's images")
        if len(labels) and not (0 <= int(labels.min()) <= int(labels.max()) < len(classes)):
            raise ValueError("not a task's labels")
        parts[part] = LabeledImages(images, labels)
    return Task(classes, **parts)


def require(condition: bool, path: Path, what: str) -> None:
    """Raise an InputError that names the file unless the condition holds."""
    if not condition:
        raise InputError(f"{path}: {what}; {_REBUILD}")
