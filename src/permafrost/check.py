"""Validate everything that a run would read, before anything is trained."""

import subprocess
import sys
from pathlib import Path
from textwrap import shorten
from typing import Any

from ruamel.yaml import YAML

from permafrost import __version__
from permafrost.artifacts import write_atomically
from permafrost.data import TaskSequence
from permafrost.devices import prepare_device, tell_cards_in_use, worker_devices
from permafrost.dvc_notes import check_notes
from permafrost.errors import InputError, printable
from permafrost.estimate import estimate
from permafrost.first_weights import weights_digest
from permafrost.images import images_digest, images_root, is_watched, note_inputs
from permafrost.interrupted import tell_interrupted
from permafrost.names import load_checked
from permafrost.params import Params
from permafrost.paths import project_root
from permafrost.registry import CUSTOM, find_custom
from permafrost.rehearsal import rehearse
from permafrost.schedule import note_schedule
from permafrost.stages.shared import PARAMS, TASKS, VERSION, seed_file
from permafrost.stages.split import make_tasks
from permafrost.tensors import load_tasks
from permafrost.training import resolve_precision


def check_all() -> str:
    """Validate params.yaml, the device and the data set; return what was found.

    What the images hold is noted in ``images.yaml``, where DVC sees whether they have changed. A
    copy that has pulled the tasks but has no images is fine: nothing has to be read anew. An
    experiment that was killed before it had gone back to its branch is told, but no fault. Where a
    file names the version of the package, it names this one from then on: DVC starts the stages.

    Raises
    ------
    InputError
        The first thing that is wrong, in one line.
    """
    find_custom(Path.cwd())
    params = load_checked(PARAMS)
    root = project_root()
    _require_git(root)
    check_notes(root, repair=False)
    if interrupted := tell_interrupted(root):
        print(interrupted, file=sys.stderr)
    _require_keys()
    _renew_version()
    device = prepare_device(params.runtime.device, params.runtime.threads)
    tell_cards_in_use(worker_devices(device, params.sweep.workers))
    resolve_precision(params.train.precision, device)
    seeds = params.seeds if params.split.selection == "random" else params.seeds[:1]
    if _has_tasks_only(params, root):
        sequence = load_tasks(seed_file(TASKS, seeds[-1]))
        found = f"{params.split.roots} is not here; what it held is in {TASKS}."
    else:
        sequence, found = _read_images(params, seeds, root)
    rehearse(params, sequence)
    lines = [f"params.yaml and data set are fine. Device: {device.type}.", *_table(sequence), found]
    expected = estimate(params, sequence, device)
    note_schedule(expected.stages)
    lines.append(str(expected))
    return "\n".join(line for line in [*lines, *_unknown_to_git()] if line)


def _table(sequence: TaskSequence) -> list[str]:
    """Return a line for each task: how many images, of which classes."""
    lines = [f"{'task':>6} {'training':>9} {'validation':>11} {'test':>6}  classes"]
    return lines + [
        f"{index:>6} {len(task.train):>9} {len(task.validation):>11} {len(task.test):>6}  "
        + shorten(", ".join(task.classes), 60, placeholder=" …")
        for index, task in enumerate(sequence.tasks, start=1)
    ]


def plan_all() -> str:
    """Tell how long `dvc repro` will take from scratch, and how much it stores."""
    find_custom(Path.cwd())
    params = load_checked(PARAMS)
    device = prepare_device(params.runtime.device, params.runtime.threads)
    if _has_tasks_only(params, project_root()):
        sequence = load_tasks(seed_file(TASKS, params.seeds[-1]))
    else:
        sequence = make_tasks(params, params.seeds[-1])
    return str(estimate(params, sequence, device))


def _has_tasks_only(params: Params, root: Path) -> bool:
    """Return whether the images are not here, but what stage split has made of them is."""
    folders = [images_root(s, root) for s in params.split.sources if is_watched(s)]
    if all(folder is None or folder.exists() for folder in folders):
        return False
    return all(seed_file(TASKS, seed).exists() for seed in params.seeds)


def _read_images(params: Params, seeds: list[int], root: Path) -> tuple[TaskSequence, str]:
    """Divide the data set for each seed; return the last, and whether the images have changed."""
    content = images_digest(params, root)
    for seed in seeds:
        sequence = make_tasks(params, seed)
    changed = note_inputs(content, weights_digest(params))
    told = {"sha256": (params.split.roots, "images"), "weights": (params.model.weights, "weights")}
    lines = [
        f"{path}: the {what} have changed; `dvc repro` reads them anew."
        for key, (path, what) in told.items()
        if key in changed and path
    ]
    return sequence, "\n".join(lines)


def _require_keys() -> None:
    """Refuse a params.yaml without a key that DVC looks for; ours would be a default."""
    yaml = YAML(typ="safe", pure=True)
    stages = yaml.load(Path("dvc.yaml"))["stages"].values()
    given = yaml.load(PARAMS)
    wanted = [key for stage in stages for key in stage.get("params", []) if isinstance(key, str)]
    for key in ["seeds", *wanted]:
        value: Any = given
        for part in key.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if value is ...:
            raise InputError(
                f"{PARAMS}: has no {key}, which dvc.yaml reads; `permafrost profile` lists files "
                "that are whole"
            )


def _renew_version() -> None:
    """Let DVC see the version that is installed now, where the project has no source of it."""
    text = f"{__version__}\n"
    if VERSION.exists() and VERSION.read_bytes() != text.encode():
        write_atomically(VERSION, text.encode())


def _unknown_to_git() -> list[str]:
    """Tell of a user's own files that a copy would lack."""
    command = ["git", "ls-files", "--others", "--exclude-standard", "--", f"{CUSTOM}/*.py"]
    listed = subprocess.run(command, capture_output=True, text=True)
    return [
        f"{printable(name)}: unknown to git; `git add` it before `dvc exp run` --temp or --queue"
        for name in listed.stdout.splitlines()
    ]


def _require_git(root: Path) -> None:
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        raise InputError(
            f"{root}: is a copy without git, which DVC needs; clone the project with git, or run "
            "`git init && git add -A && git commit -m start` here"
        )
