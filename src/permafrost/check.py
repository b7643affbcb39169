"""Validate everything that a run would read, before anything is trained."""

from permafrost.stages.split import make_tasks
from permafrost.stages.workspace import prepare_device, project_root, read_params


def check_all() -> str:
    """Validate params.yaml, the device and the data set; return a line that says what was found.

    Raises
    ------
    InputError
        The first thing that is wrong, in one line.
    """
    params = read_params()
    project_root()
    device = prepare_device(params)
    for seed in params.seeds if params.split.selection == "random" else params.seeds[:1]:
        sequence = make_tasks(params, seed)
    tasks = "; ".join(
        f"task {index} {', '.join(task.classes)}: {len(task.train)} training, "
        f"{len(task.validation)} validation and {len(task.test)} test images"
        for index, task in enumerate(sequence.tasks, start=1)
    )
    return f"params.yaml and data set are fine. {tasks}. Device: {device.type}."
