"""The formats on disk: safetensors and JSON, written whole or not at all, checked when read.

Without PyTorch, which takes seconds to import; :mod:`permafrost.tensors` has its tensors.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from permafrost.errors import DamagedError, InputError


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
        raise DamagedError(f"{path}: is no valid JSON; {REBUILD}") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


REBUILD = "it is damaged: delete it by `permafrost doctor --repair`, then run `dvc repro`"

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


HEADER, _CHECKSUM = "permafrost", "checksum"


def _checksum(row: Any, place: int, rows: int) -> str:
    """Hash a row and its place, so that a row that was dropped is missed."""
    text = json.dumps([row, place, rows], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# Of a tensor: its name, its dtype as PyTorch calls it, its shape and its bytes.
Entry = tuple[str, str, list[int], memoryview]


def tensors_header(entries: Iterable[Entry], about: Any) -> str:
    """Return the header of a file of tensors, with its checksum.

    Parameters
    ----------
    entries : iterable of Entry
        The tensors, in any order.
    about : object
        Anything JSON can hold.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, dtype, shape, content in sorted(entries, key=lambda entry: entry[0]):
        digest.update(f"\0{name} {dtype} {shape}\0".encode())
        digest.update(content)
    return json.dumps({"about": about, _CHECKSUM: digest.hexdigest()}, sort_keys=True)


def read_tensors(
    path: Path, framework: str, entry: Callable[[str, Any], Entry]
) -> tuple[dict[str, Any], Any]:
    """Read a file of tensors by one of safetensors' frameworks: the tensors and ``about``.

    Raises
    ------
    InputError
        If the file is missing.
    DamagedError
        If it is not what was written.
    """
    try:
        path.open("rb").close()  # safetensors takes all that keeps it from opening for absence
        with safe_open(path, framework=framework) as file:
            header = (file.metadata() or {}).get(HEADER, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        written = json.loads(header)
        require(isinstance(written, dict), path, "is not what was written")
        about = written.get("about")
        whole = header == tensors_header((entry(*item) for item in tensors.items()), about)
        require(whole, path, "is not what was written")
        return tensors, about
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run the stage that writes it (dvc repro)") from None
    except (SafetensorError, ValueError) as error:
        raise DamagedError(f"{path}: {error}; {REBUILD}") from None


def load_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read tensors as NumPy's arrays, and what is noted about them; raise as `read_tensors`."""

    def entry(name: str, array: NDArray[Any]) -> Entry:
        return (
            name,
            f"torch.{array.dtype}",
            list(array.shape),
            array.reshape(-1).view(np.uint8).data,
        )

    return read_tensors(path, "np", entry)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require(condition: bool, path: Path, what: str) -> None:
    """Raise a DamagedError that names the file unless the condition holds."""
    if not condition:
        raise DamagedError(f"{path}: {what}; {REBUILD}")
