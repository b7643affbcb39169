"""Stage split: which images and classes make up the tasks."""

from pathlib import Path

from permafrost.data import TaskFrom, TaskSequence, load_dataset, split_tasks, tasks_of
from permafrost.first_weights import weights_digest
from permafrost.images import images_digest, images_root, note_inputs
from permafrost.params import Params
from permafrost.paths import project_root
from permafrost.stages.shared import TASKS, refuse_changed, seed_file
from permafrost.stages.workspace import open_workspace
from permafrost.tensors import save_tasks


def make_tasks(params: Params, seed: int) -> TaskSequence:
    """Load the data sets and divide them.

    Raises
    ------
    InputError
        If a data set cannot be used.
    """
    split, root = params.split, project_root()
    datasets = {
        source: load_dataset(source.dataset, images_root(source, root), split.height_and_width)
        for source in split.sources
    }
    if not isinstance(split.tasks, int):
        return tasks_of(
            [
                TaskFrom(datasets[task.source], task.classes, task.flip, task.padding, task.epochs)
                for task in split.tasks
            ],
            validation=split.validation,
            test_share=split.test_share,
        )
    (dataset,) = datasets.values()
    return split_tasks(
        dataset,
        classes=split.classes,
        classes_per_task=split.classes_per_task,
        tasks=split.tasks,
        selection=split.selection,
        validation=split.validation,
        test_share=split.test_share,
        seed=seed,
    )


def run(seed: int) -> None:
    """Write the tasks of one seed, and note what the images hold."""
    with open_workspace("split", seed) as workspace:
        params = workspace.params
        content = images_digest(params, project_root())
        tasks = make_tasks(params, seed)
        changed = images_digest(params, project_root()) != content
        refuse_changed(Path(params.split.roots), "split", changed)
        save_tasks(seed_file(TASKS, seed), tasks)
        note_inputs(content, weights_digest(params))
