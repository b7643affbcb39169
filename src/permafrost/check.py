"""Validate everything that a run would read, before anything is trained."""

from pathlib import Path

from permafrost.errors import InputError
from permafrost.stages.split import make_tasks
from permafrost.stages.workspace import prepare_device, project_root, read_params
from permafrost.training import resolve_precision


def check_all() -> str:
    """Validate params.yaml, the device and the data set; return a line that says what was found.

    Raises
    ------
    InputError
        The first thing that is wrong, in one line.
    """
    params = read_params()
    _require_git(project_root())
    device = prepare_device(params)
    resolve_precision(params.train.precision, device)
    for seed in params.seeds if params.split.selection == "random" else params.seeds[:1]:
        sequence = make_tasks(params, seed)
    tasks = "; ".join(
        f"task {index} {', '.join(task.classes)}: {len(task.train)} training, "
        f"{len(task.validation)} validation and {len(task.test)} test images"
        for index, task in enumerate(sequence.tasks, start=1)
    )
    return f"params.yaml and data set are fine. {tasks}. Device: {device.type}."


def _require_git(root: Path) -> None:
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        raise InputError(
            f"{root}: is a copy without git, which DVC needs; clone the project with git, or run "
            "`git init && git add -A && git commit -m start` here"
        )
