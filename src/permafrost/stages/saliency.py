"""Stage saliency: maps of what the network looks at, one for each class."""

from collections.abc import Iterator

import torch
from torch import Tensor

from permafrost.artifacts import load_tasks, save_tensors
from permafrost.data import Batches, LabeledImages
from permafrost.experiment import explain_config
from permafrost.explain import saliency_maps
from permafrost.pictures import draw_saliency
from permafrost.ranking.method import BATCH_SIZE, explain_classes
from permafrost.stages.workspace import (
    SALIENCY,
    SALIENCY_PICTURES,
    TASKS,
    open_stage,
    progress_bar,
    seed_file,
)

EXAMPLES_PER_CLASS = 4


def run(seed: int) -> None:
    """Write the class maps of one seed's first task, and the picture of them."""
    with open_stage("saliency", seed) as workspace:
        sequence = load_tasks(seed_file(TASKS, seed))
        task = sequence.tasks[0]
        model = workspace.first_network(seed).view("shared", 0, 1)
        batches = Batches(task.train, sequence.normalization, workspace.device)
        config = explain_config(workspace.params)
        method, reading = config.method, config.reading
        with progress_bar(f"saliency, seed {seed}", len(batches)) as advance:

            def shown() -> Iterator[tuple[Tensor, Tensor]]:
                for images, labels in batches.ordered(BATCH_SIZE):
                    yield images, labels
                    advance(len(labels))

            result = explain_classes(model, shown(), len(task.classes), config)
        error = result.completeness
        save_tensors(
            seed_file(SALIENCY, seed),
            {"maps": result.maps},
            {"classes": list(task.classes), "method": method, "completeness_error": error},
        )
        chosen = torch.cat(
            [
                (task.train.labels == label).nonzero().flatten()[:EXAMPLES_PER_CLASS]
                for label in range(len(task.classes))
            ]
        )
        examples = LabeledImages(task.train.images[chosen], task.train.labels[chosen])
        maps = torch.cat(
            [
                saliency_maps(model, images, labels, method, reading=reading)
                for images, labels in Batches(
                    examples, sequence.normalization, workspace.device
                ).ordered(BATCH_SIZE)
            ]
        )
        draw_saliency(
            seed_file(SALIENCY_PICTURES, seed, ".png"),
            task.classes,
            examples.images,
            maps.cpu(),
            result.maps.cpu(),
            method,
        )
        about = "" if error is None else f", its terms add up to the logit within {error:.1e}"
        print(f"saliency, seed {seed}: maps by {method}{about}")
