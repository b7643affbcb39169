"""What is stored of runs, to be looked at; without PyTorch.

A run is stored in a folder of its key in ``.permafrost/cells``; it is whole if and only if its
result is there, which is written last.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from permafrost.artifacts import load_record
from permafrost.errors import InputError
from permafrost.processes import project_lock

MODEL, KEPT = "model.safetensors", "kept.safetensors"


class StoredRuns:
    """The runs that one project has stored.

    Parameters
    ----------
    root : Path
        The project's root.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".permafrost" / "cells"

    def result_path(self, key: str) -> Path:
        """Return the file of a stored run's record, with its seconds and its machine."""
        return self.folder / key / "cell.json"

    def result(self, key: str) -> dict[str, Any] | None:
        """Return what that file holds; None where the run is not stored."""
        path = self.result_path(key)
        return load_record(path) if path.exists() else None

    def model_path(self, key: str) -> Path:
        """Return the file of a stored run's final weights."""
        return self.folder / key / MODEL

    def kept_path(self, key: str) -> Path:
        """Return the file of what else a stored run keeps."""
        return self.folder / key / KEPT

    def name(self, key: str) -> str:
        """Return a stored run's name for people; one that is not whole has none yet."""
        try:
            return str(load_record(self.result_path(key))["record"]["name"])
        except InputError:
            return "(not whole)"

    def seconds(self, key: str) -> float | None:
        """Return how long the epochs of a run's training took; None if it is not stored."""
        result = self.result(key)
        return None if result is None else float(result["seconds"])

    def is_new(self, key: str, since: float) -> bool:
        """Return whether a stored training came to its end after a time."""
        return self.result_path(key).stat().st_mtime >= since

    def is_active(self, key: str) -> bool:
        """Return whether a process is training the run now."""
        try:
            with self.lock(key, timeout=0):
                return False
        except Timeout:
            return True

    def delete(self, key: str) -> int | None:
        """Delete a run; return the bytes that were freed, or None if it is in training."""
        folder = self.folder / key
        try:
            with self.lock(key, timeout=0):
                freed = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                if folder.exists():
                    shutil.rmtree(folder)
        except Timeout:
            return None
        return freed

    def stored_keys(self) -> list[str]:
        """Return the keys of all runs, whole or not."""
        return sorted(path.name for path in self.folder.glob("*") if path.is_dir())

    @contextmanager
    def lock_or_wait(self, key: str, name: str) -> Iterator[None]:
        """Lock a run; say so if another process is at it."""
        with ExitStack() as held:
            try:
                held.enter_context(self.lock(key, timeout=0))
            except Timeout:
                print(f"{name}: another process trains it; waiting for that", file=sys.stderr)
                held.enter_context(self.lock(key))
            yield

    def lock(self, key: str, timeout: float = -1) -> FileLock:
        """Return what keeps other processes from what is stored under a key: a `project_lock`."""
        return project_lock(self.root, key, timeout)
