"""DVC's own notes, each written as a whole or not at all.

DVC writes ``dvc.lock`` and ``.dvc/tmp/rwlock`` over the old ones, and what its run cache keeps of a
stage into the folder where it looks for it. Killed in the middle of that it leaves a part, or an
empty folder, and no ``dvc repro`` goes on until somebody has mended or deleted it. Python imports
this module at its start wherever permafrost is installed, as ``permafrost_dvc.pth`` says. Once DVC
is imported, it writes such a file elsewhere on the same disk, and then moves it to its place.
"""

import importlib.util
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar


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
            os.replace(self._part, self._path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(self._part)


def _folder(path: str) -> str:
    """Return where a kill may leave a part: DVC's folder for such files, if on the same disk."""
    beside = Path(path).parent
    for folder in (beside, *beside.parents):
        scratch = folder / ".dvc" / "tmp"
        if scratch.is_dir() and scratch.stat().st_dev == beside.stat().st_dev:
            return str(scratch)
    return str(beside)


def _open(path: Any, mode: str = "r", encoding: str | None = None, **_: Any) -> Any:
    """Open as DVC does, but write text into a replacement."""
    if mode in ("w", "w+"):
        return _Replacement(os.fspath(path), encoding)
    return open(path, mode=mode, encoding=encoding)


def _patch_file_system(module: Any) -> None:
    module.LocalFileSystem.open = staticmethod(_open)


def _patch_serialization(module: Any) -> None:
    module.open = _open


def _patch_run_cache(module: Any) -> None:
    load = module.StageCache._load

    def load_if_any(self: Any, stage: Any) -> Any:
        key = module._get_stage_hash(stage)
        folder = self._get_cache_dir(key) if key else ""
        return None if os.path.isdir(folder) and not os.listdir(folder) else load(self, stage)

    module.StageCache._load = load_if_any


class _Finder:
    """Finds DVC's modules that read and write notes, and patches them once they are imported."""

    patches: ClassVar[dict[str, Callable[[Any], None]]] = {
        "dvc_objects.fs.local": _patch_file_system,
        "dvc.utils.serialize._common": _patch_serialization,
        "dvc.stage.cache": _patch_run_cache,
    }

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        patch = cls.patches.pop(name, None)
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
