"""Stage split: which images and classes make up the tasks."""

from permafrost.artifacts import save_tasks
from permafrost.data import TaskSequence, load_dataset, split_tasks
from permafrost.params import Params
from permafrost.stages.workspace import TASKS, open_stage, project_root, seed_file


def make_tasks(params: Params, seed: int) -> TaskSequence:
    """Load the data set and divide it.

    Raises
    ------
    InputError
        If the data set cannot be used.
    """
    split = params.split
    # Relative to the project, not to the copy that `dvc exp run --temp` works in.
    root = None if split.root is None else project_root() / split.root
    return split_tasks(
        load_dataset(split.dataset, root, split.image_size),
        classes_per_task=split.classes_per_task,
        tasks=split.tasks,
        selection=split.selection,
        validation=split.validation,
        test_share=split.test_share,
        seed=seed,
    )


def run(seed: int) -> None:
    """Write the tasks of one seed."""
    with open_stage("split", seed) as workspace:
        save_tasks(seed_file(TASKS, seed), make_tasks(workspace.params, seed))
