"""Stage saliency: maps of what the network looks at, one for each class."""

from collections.abc import Iterator

import torch
from torch import Tensor

from permafrost.data import Batches, LabeledImages, Task, TaskSequence
from permafrost.experiment import explain_config
from permafrost.explain import SALIENCY_METHODS, saliency_maps
from permafrost.pictures import draw_saliency
from permafrost.ranking import method as method_code
from permafrost.ranking.method import explain_classes, in_order
from permafrost.runs.results import Result
from permafrost.stages.shared import (
    FIRST,
    SALIENCY,
    SALIENCY_PICTURES,
    TASKS,
    progress_bar,
    seed_file,
)
from permafrost.stages.workspace import Workspace, open_workspace
from permafrost.tensors import load_tasks, save_tensors

EXAMPLES_PER_CLASS = 4


def run(seed: int) -> None:
    """Write the class maps of one seed's first task, and the picture of them."""
    with open_workspace("saliency", seed) as workspace:
        sequence = load_tasks(seed_file(TASKS, seed))
        task = sequence.tasks[0]
        config = explain_config(workspace.params)
        tensors, about = workspace.obtain(
            "saliency",
            {"method": config.method, "reading": config.reading, "seed": seed},
            [seed_file(TASKS, seed), seed_file(FIRST, seed)],
            [
                method_code.__name__,
                SALIENCY_METHODS.home(config.method),
            ],
            lambda: _explain(workspace, seed, sequence),
        )
        save_tensors(seed_file(SALIENCY, seed), {"maps": tensors["maps"]}, about)
        draw_saliency(
            seed_file(SALIENCY_PICTURES, seed, ".png"),
            task.classes,
            _examples(task).images,
            tensors["examples"],
            tensors["maps"],
            config.method,
        )
        error = about["completeness_error"]
        told = "" if error is None else f", its terms add up to the logit within {error:.1e}"
        print(f"saliency, seed {seed}: maps by {config.method}{told}")


def _explain(workspace: Workspace, seed: int, sequence: TaskSequence) -> Result:
    """Return the maps of the classes and of the examples."""
    task = sequence.tasks[0]
    model = workspace.first_network(seed).view("shared", 0, 1)
    batches = Batches(task.train, sequence.normalization, workspace.device)
    config = explain_config(workspace.params)
    method, reading = config.method, config.reading
    with progress_bar(f"saliency, seed {seed}", len(batches)) as advance:

        def shown() -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in in_order(batches):
                yield images, labels
                advance(len(labels))

        result = explain_classes(model, shown(), len(task.classes), config)
    examples = Batches(_examples(task), sequence.normalization, workspace.device)
    maps = torch.cat(
        [
            saliency_maps(model, images, labels, method, reading=reading)
            for images, labels in in_order(examples)
        ]
    )
    error = result.completeness
    about = {"classes": list(task.classes), "method": method, "completeness_error": error}
    return {"maps": result.maps, "examples": maps}, about


def _examples(task: Task) -> LabeledImages:
    """Return the first images of each class."""
    chosen = torch.cat(
        [
            (task.train.labels == label).nonzero().flatten()[:EXAMPLES_PER_CLASS]
            for label in range(len(task.classes))
        ]
    )
    return LabeledImages(task.train.images[chosen], task.train.labels[chosen])
