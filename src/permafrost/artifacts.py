"""The formats on disk: safetensors and JSON, written whole or not at all, checked when read."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from permafrost.data import LabeledImages, Normalization, Task, TaskSequence
from permafrost.errors import DamagedError, InputError

_PARTS = ("train", "validation", "test")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, through a crash too.

    Raises
    ------
    OSError
        With the file's name, if it cannot be written: a full disk, a read-only folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part(path) as (part, descriptor):
            try:
                _write_all(descriptor, content)
                os.chmod(part, 0o644)
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        error.filename = str(path)  # a full disk is told without a name
        raise


@contextmanager
def _part(path: Path) -> Iterator[tuple[Path, int]]:
    """Open the file beside `path` that is written first, for one writer at a time.

    Its name is always the same, so that the next writer takes over what a killed one has left.
    """
    part = path.with_name(f".{path.name}.part")
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_open_at(part, descriptor):
                yield part, descriptor
                return
        finally:
            os.close(descriptor)


def _is_open_at(path: Path, descriptor: int) -> bool:
    """Return whether this is still the file at `path`: another writer may have renamed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_all(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def save_json(path: Path, value: Any) -> None:
    """Write JSON that others read, with sorted keys; NaN and infinity are refused."""
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
        return json.loads(path.read_bytes(), parse_constant=_no_number)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run the stage that writes it (dvc repro)") from None
    except ValueError:
        raise DamagedError(f"{path}: is no valid JSON; {_REBUILD}") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


_REBUILD = "it is damaged: delete it by `permafrost doctor --repair`, then run `dvc repro`"

Record = dict[str, Any] | list[dict[str, Any]]


def save_record(path: Path, record: Record) -> None:
    """Write results that are read again: JSON in which every row carries its own checksum.

    Parameters
    ----------
    path : Path
        Where to.
    record : dict or list of dict
        A row, or several.
    """
    rows = record if isinstance(record, list) else [record]
    # In a list, which DVC's tables of metrics leave out.
    sealed = [row | {_CHECKSUM: [_checksum(row, at, len(rows))]} for at, row in enumerate(rows)]
    save_json(path, sealed if isinstance(record, list) else sealed[0])


def load_record(path: Path) -> Any:
    """Read what :func:`save_record` wrote.

    Raises
    ------
    InputError
        If the file is missing or a row is not what was written.
    """
    sealed = load_json(path)
    rows = sealed if isinstance(sealed, list) else [sealed]
    require(len(rows) > 0, path, "has no rows")
    for at, row in enumerate(rows):
        checksum = row.pop(_CHECKSUM, None) if isinstance(row, dict) else None
        require(_is_sealed(row, at, len(rows), checksum), path, "is not what was written")
    return sealed


def _is_sealed(row: Any, place: int, rows: int, checksum: Any) -> bool:
    try:
        return bool(checksum == [_checksum(row, place, rows)])
    except ValueError:  # 1e999 is read as infinity
        return False


_HEADER, _CHECKSUM = "permafrost", "checksum"


def _checksum(row: Any, place: int, rows: int) -> str:
    """Hash a row and its place, so that a row that was dropped is missed."""
    text = json.dumps([row, place, rows], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
    header = {"about": about, _CHECKSUM: _tensors_checksum(dense, about)}
    # One entry: safetensors writes several in a random order.
    metadata = {_HEADER: json.dumps(header, sort_keys=True)}
    write_atomically(path, serialise(dense, metadata=metadata))


def _tensors_checksum(tensors: Mapping[str, Tensor], about: Any) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_tensors` wrote: the tensors and ``about``.

    Raises
    ------
    InputError
        If the file is missing.
    DamagedError
        If it is not what was written.
    """
    try:
        path.open("rb").close()  # safetensors takes all that keeps it from opening for absence
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        require(isinstance(header, dict), path, "is not what was written")
        about = header.get("about")
        whole = header.get(_CHECKSUM) == _tensors_checksum(tensors, about)
        require(whole, path, "is not what was written")
        return tensors, about
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run the stage that writes it (dvc repro)") from None
    except (SafetensorError, ValueError) as error:
        raise DamagedError(f"{path}: {error}; {_REBUILD}") from None


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
    """Raise a DamagedError that names the file unless the condition holds."""
    if not condition:
        raise DamagedError(f"{path}: {what}; {_REBUILD}")
