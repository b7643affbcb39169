"""What of this machine can change the bits of a result, and which stored files are damaged."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from permafrost.artifacts import load_record
from permafrost.devices import prepare_device
from permafrost.errors import DamagedError, InputError
from permafrost.machine import fingerprint
from permafrost.paths import cached_files, project_root
from permafrost.runs.store import RunStore
from permafrost.stages.shared import (
    FIRST_RECORDS,
    FROZEN,
    SECOND_RECORDS,
    SUMMARIES,
    SWEEP,
    TASKS,
    TRIALS,
    read_params,
)
from permafrost.tensors import load_tensors
from permafrost.variants import variant_files


def describe_machine() -> str:
    """Return what could make another machine's results differ, a line each."""
    runtime = read_params().runtime
    # Sets the threads and what makes PyTorch deterministic.
    device = prepare_device(runtime.device, runtime.threads)
    facts = {"device": device.type} | fingerprint()
    width = max(len(name) for name in facts)
    return "\n".join(f"{name:{width}}  {value}" for name, value in facts.items())


def check_files(*, repair: bool) -> str:
    """Look through all stored files, tell each that is damaged, and delete it if asked to.

    Raises
    ------
    InputError
        If a damaged file is left.
    """
    found = _damaged()
    left = 0
    for path in found:
        deleted = repair and _delete(path)
        left += not deleted
        print(f"{path}: is not what was written{'; deleted' if deleted else ''}", file=sys.stderr)
    if left:
        raise InputError(f"{left} damaged; `permafrost doctor --repair` deletes them")
    if not found:
        return "All stored files are what was written."
    if any(path.is_relative_to(project_root() / ".permafrost" / "variants") for path in found):
        return "`dvc repro` makes them again, `dvc repro -f -s evaluate` a variant's summary."
    return "`dvc repro` makes them again."


def _damaged() -> list[Path]:
    """Return the stored files that are not what was written, and the folders of such trainings."""
    root = project_root()
    store = RunStore(root)
    runs = [store.folder / key for key in store.stored_keys() if not store.is_whole(key)]
    return [*_damaged_artifacts(root), *runs, *_damaged_cache(root)]


def _delete(path: Path) -> bool:
    """Delete a damaged file or training; return whether it is gone."""
    if path.is_dir():
        RunStore(project_root()).delete(path.name)
    else:
        path.unlink(missing_ok=True)
    return not path.exists()


def _damaged_artifacts(root: Path) -> Iterator[Path]:
    """Look through what the stages of this copy of the project have written."""
    tensors = [*TASKS.glob("*.safetensors"), *Path("models").glob("*/*.safetensors")]
    records = [*SUMMARIES, TRIALS, SWEEP, *variant_files(root)]
    for folder in (FIRST_RECORDS, SECOND_RECORDS, FROZEN):
        records += folder.glob("*.json")
    for load, paths in ((load_tensors, tensors), (load_record, records)):
        for path in sorted(path for path in paths if path.exists()):
            try:
                load(path)
            except DamagedError:
                yield path


def _damaged_cache(root: Path) -> Iterator[Path]:
    """Look through DVC's cache."""
    for path in sorted(cached_files(root).glob("??/*")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        if path.parent.name + path.name.removesuffix(".dir") != digest:
            yield path
