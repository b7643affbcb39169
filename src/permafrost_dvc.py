"""DVC's own notes, each written as a whole or not at all.

DVC writes ``dvc.lock`` and ``.dvc/tmp/rwlock`` over the old ones, and what its run cache keeps of a
stage into the folder where it looks for it. Killed in the middle of that it leaves a part, or an
empty folder, and no ``dvc repro`` goes on until somebody has mended or deleted it; nor does one if
the number of a process that was killed is that of any other by now. Python imports this module at
its start wherever permafrost is installed, as ``permafrost_dvc.pth`` says. Once DVC is imported, it
writes such a file elsewhere on the same disk and then moves it to its place.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import re
import sys
from contextlib import suppress
from types import SimpleNamespace

TYPE_CHECKING = False  # every Python starts with this module: typing would take as long as the rest
if TYPE_CHECKING:
    from typing import Any


class _Replacement(io.TextIOWrapper):
    """A text file that takes the place of another when it is whole."""

    def __init__(self, path: str, encoding: str | None) -> None:
        self._path = os.path.realpath(path)
        self._part = f"{_folder(self._path)}/{os.path.basename(path)}.{os.getpid()}.part"
        super().__init__(open(self._part, "w+b"), encoding=encoding)  # noqa: SIM115 - it closes it

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            self._path = self._part  # which is then deleted
        super().__exit__(kind, *error)

    def close(self) -> None:
        if self.closed:
            return
        try:
            super().close()
            _move(self._part, self._path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(self._part)


def _folder(path: str) -> str:
    """Return where a kill may leave a part: DVC's folder for such files, or that of the file."""
    beside = folder = os.path.dirname(path)
    while not os.path.isdir(f"{folder}/.dvc"):
        if folder == os.path.dirname(folder):
            return beside
        folder = os.path.dirname(folder)
    scratch = f"{folder}/.dvc/tmp"
    return scratch if os.access(scratch, os.W_OK | os.X_OK) else beside


def _move(part: str, path: str) -> None:
    with suppress(OSError):  # there is none yet, or it is another's
        os.chmod(part, os.stat(path).st_mode)
    try:
        os.replace(part, path)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        # Another disk, or mounted by itself: as DVC writes it.
        with open(part, "rb") as whole, open(path, "wb") as file:
            file.write(whole.read())


def _open(path: Any, mode: str = "r", encoding: str | None = None, **_: Any) -> Any:
    """Open as DVC does, but write text into a replacement."""
    if mode in ("w", "w+"):
        return _Replacement(os.fspath(path), encoding)
    return open(path, mode=mode, encoding=None if "b" in mode else encoding)


def _patch_file_system(module: Any) -> None:
    module.LocalFileSystem.open = staticmethod(_open)


def _patch_serialization(module: Any) -> None:
    module.open = _open


def _patch_run_cache(module: Any) -> None:
    """Pass over what is no entry: a part, or None of an empty folder."""
    load = module.StageCache._load_cache

    def load_entry(self: Any, key: str, value: str | None) -> Any:
        return load(self, key, value) if value and re.fullmatch("[0-9a-f]{64}", value) else None

    module.StageCache._load_cache = load_entry


def _patch_lock(module: Any) -> None:
    """Take a process for the one that holds a lock only if it is another that runs DVC."""
    psutil = module.psutil

    def runs_dvc(pid: int) -> bool:
        try:
            return pid != os.getpid() and "dvc" in " ".join(psutil.Process(pid).cmdline())
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:  # another user's
            return True

    module.psutil = SimpleNamespace(pid_exists=runs_dvc)


_PATCHES = {
    "dvc_objects.fs.local": _patch_file_system,
    "dvc.utils.serialize._common": _patch_serialization,
    "dvc.stage.cache": _patch_run_cache,
    "dvc.rwlock": _patch_lock,
}


class _Finder:
    """Finds DVC's modules that read and write notes, and patches them once they are imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        patch = _PATCHES.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None
        execute = spec.loader.exec_module  # type: ignore[union-attr]

        def exec_module(module: Any) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
        return spec


sys.meta_path.insert(0, _Finder)
