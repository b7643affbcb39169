"""What of this machine can change the bits of a result, and which stored files are damaged."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from permafrost.artifacts import load_record, load_tensors
from permafrost.cells import CellStore
from permafrost.errors import DamagedError
from permafrost.machine import fingerprint
from permafrost.stages.workspace import (
    FIRST_RECORDS,
    FROZEN,
    SECOND_RECORDS,
    SWEEP,
    TASKS,
    TUNE,
    VARIANT,
    prepare_device,
    project_root,
    read_params,
)
from permafrost.variants import variant_files


def describe_machine() -> str:
    """Return what could make another machine's results differ, a line each."""
    device = prepare_device(read_params())  # sets the threads and what makes PyTorch deterministic
    facts = {"device": device.type} | fingerprint()
    width = max(len(name) for name in facts)
    return "\n".join(f"{name:{width}}  {value}" for name, value in facts.items())


def damaged() -> list[Path]:
    """Return the stored files that are not what was written, and the folders of such trainings."""
    root = project_root()
    store = CellStore(root)
    cells = [store.folder / key for key in store.stored_keys() if not store.is_whole(key)]
    return [*_damaged_artifacts(root), *cells, *_damaged_cache(root)]


def delete(paths: list[Path]) -> None:
    """Delete damaged files; `dvc repro` makes them again."""
    CellStore(project_root()).delete([path.name for path in paths if path.is_dir()])
    for path in paths:
        if path.is_file():
            path.unlink()


def _damaged_artifacts(root: Path) -> Iterator[Path]:
    """Look through what the stages of this copy of the project have written."""
    tensors = [*TASKS.glob("*.safetensors"), *Path("models").glob("*/*.safetensors")]
    records = [VARIANT, TUNE, SWEEP, *variant_files(root)]
    for folder in (FIRST_RECORDS, SECOND_RECORDS, FROZEN):
        records += folder.glob("*.json")
    for load, paths in ((load_tensors, tensors), (load_record, records)):
        for path in sorted(path for path in paths if path.exists()):
            try:
                load(path)
            except DamagedError:
                yield path


def _damaged_cache(root: Path) -> Iterator[Path]:
    """Look through DVC's cache, where a file's name is the MD5 of its content."""
    from dvc.repo import Repo

    for path in sorted(Path(Repo(str(root)).cache.local.path).glob("??/*")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        if path.parent.name + path.name.removesuffix(".dir") != digest:
            yield path
