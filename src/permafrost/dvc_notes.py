"""DVC's own notes, of which a kill may leave a part: found, and mended.

DVC writes ``dvc.lock``, ``.dvc/tmp/rwlock`` and its notes of experiments over the old ones, and an
entry of its run cache into the folder where it looks for it. Killed within these milliseconds, or
without space, it leaves a part, or an empty file or folder, and does not go on until that is
mended. It also takes a lock for held as long as any process has the number of the one that took it.
What is done:

``dvc.lock``
    What is left is the beginning of what DVC was writing. All of its entries but the last are
    whole, and stay. The others come from git, as far as it knows them: an entry says which outputs
    belong to which inputs, which stays true. For a stage without an entry DVC looks into its run
    cache, and trainings are stored besides, so that none is repeated.
locks, notes of experiments
    A part says nothing, and is deleted; so are locks, if all the processes that took them are gone.
the run cache
    The part of an entry is deleted, and so is the folder that was made for it.

A note that is just being written is whole a moment later, so only what stays is a fault. Nothing is
changed while DVC is at work in the project.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from ruamel.yaml import YAML, YAMLError

from permafrost.errors import InputError
from permafrost.paths import dvc_cache

_MOMENT = 1.0  # seconds, in which DVC has written any note
_HEAD = "schema: '2.0'\nstages:\n"  # of dvc.lock


class Fault(NamedTuple):
    """A note that DVC cannot go on with."""

    path: Path
    what: str
    whole: str | None = None  # what takes its place; None deletes it


def check_notes(root: Path, *, repair: bool) -> None:
    """Look through DVC's notes, and mend what is damaged if asked to.

    Raises
    ------
    InputError
        If a damaged note is left.
    """
    found = _lasting_faults(root)
    if not found:
        return
    first = f"{found[0].path}: {found[0].what}"
    if not repair:
        raise InputError(f"{first}; `permafrost doctor --repair` mends it")
    if at_work := dvc_processes(root):
        numbers = ", ".join(map(str, at_work))
        raise InputError(f"{first}; DVC is at work here (process {numbers}): repair it after that")
    for fault in found:
        _mend(root, fault)
        done = "deleted" if fault.whole is None else "mended"
        print(f"{fault.path}: {fault.what}; {done}", file=sys.stderr)


def dvc_processes(root: Path) -> list[int]:
    """Return the processes that run DVC in a project; of another user's it is not known where."""
    found, root = [], root.resolve()
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words, folder = process.info["cmdline"] or [], process.info["cwd"]
        if "dvc" in map(os.path.basename, words) and Path(folder or root).is_relative_to(root):
            found.append(process.pid)
    return found


def _lasting_faults(root: Path) -> list[Fault]:
    found = list(_faults(root))
    if found:
        time.sleep(_MOMENT)
        found = [fault for fault in _faults(root) if fault in found]
    return found


def _faults(root: Path) -> Iterator[Fault]:
    yield from _cut_lock_file(root)
    scratch = root / ".dvc" / "tmp"
    experiments = (scratch / "exps" / "run").glob("*/*")
    notes = [path for path in sorted(experiments) if path.suffix in (".json", ".run")]
    for path in (scratch / "rwlock", scratch / "exps" / "rwlock", *notes):
        try:
            note = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except ValueError:
            yield Fault(path, "is cut off")
            continue
        if path.name == "rwlock" and not dvc_processes(root) and (number := _reused_number(note)):
            yield Fault(path, f"has a lock of process {number}, which is not DVC")
    yield from _unfinished_entries(dvc_cache(root) / "runs")


def _cut_lock_file(root: Path) -> Iterator[Fault]:
    path = root / "dvc.lock"
    if not path.exists():
        return
    head, *entries = _divide(path.read_text(errors="replace"))
    others = re.search(r"^[^ \n]", "".join(entries), flags=re.MULTILINE)  # as a conflict of git
    if not _HEAD.startswith(head.rstrip(" ")) or others or (entries and _is_whole(entries[-1])):
        return
    known = {entry.split("\n")[0]: entry for entry in entries[:-1]}
    index = ["git", "-C", str(root), "show", ":./dvc.lock"]
    _, *older = _divide(subprocess.run(index, capture_output=True, text=True).stdout)
    whole = {entry.split("\n")[0]: entry for entry in older if _is_whole(entry)} | known
    yield Fault(path, "is cut off", _HEAD + "".join(whole.values()) if whole else None)


def _divide(text: str) -> list[str]:
    """Divide ``dvc.lock`` into what is before the stages' entries, and each of these."""
    return re.split(r"^(?=  \S)", text, flags=re.MULTILINE)


def _is_whole(entry: str) -> bool:
    """Return whether DVC reads an entry; if only outputs or the like are missing, it does."""
    try:
        stages = YAML(typ="safe", pure=True).load(entry)
    except YAMLError:
        return False
    (stage,) = stages.values() if isinstance(stages, dict) else [None]
    if not isinstance(stage, dict) or "cmd" not in stage or not entry.endswith("\n"):
        return False
    return None not in [*stage.values(), *(stage.get("params") or {}).values()]


def _reused_number(locks: dict[str, Any]) -> int | None:
    """Return a number under which another process runs now than the one that took a lock.

    None if one that took a lock is still there, as its command says, or may be: another user's.
    """
    found = None
    read = [holder for holders in locks.get("read", {}).values() for holder in holders]
    for holder in [*locks.get("write", {}).values(), *read]:
        try:
            command = " ".join(psutil.Process(holder["pid"]).cmdline())
        except psutil.NoSuchProcess:
            continue  # as DVC sees by itself
        except psutil.AccessDenied:
            return None
        if command.endswith(holder["cmd"]):
            return None
        found = holder["pid"]
    return found


def _unfinished_entries(runs: Path) -> Iterator[Fault]:
    for folder in sorted(runs.glob("??/*/")):
        names = os.listdir(folder)
        parts = [name for name in names if re.fullmatch(r"\.[\w-]{22}\.tmp", name)]
        yield from (Fault(folder / name, "is no whole entry") for name in parts)
        if len(parts) == len(names):
            yield Fault(folder, "has no entry")


def _mend(root: Path, fault: Fault) -> None:
    if fault.whole is not None:
        part = root / ".dvc" / "tmp" / f"{fault.path.name}.part"
        part.write_text(fault.whole)
        os.replace(part, fault.path)
    elif fault.path.is_dir():
        fault.path.rmdir()
    else:
        fault.path.unlink(missing_ok=True)
