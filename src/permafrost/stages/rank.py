"""Stage rank: order every layer's filters by each criterion."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from permafrost.artifacts import require
from permafrost.data import Batches
from permafrost.experiment import explain_config
from permafrost.models import TaskNetwork
from permafrost.pictures import draw_best_and_worst
from permafrost.ranking import (
    CRITERIA,
    Evidence,
    method,
    needs_images,
    needs_maps,
    network_evidence,
)
from permafrost.runs.results import Result
from permafrost.stages.shared import (
    FILTERS,
    FIRST,
    RANK_PICTURES,
    RANKS,
    SALIENCY,
    TASKS,
    seed_file,
)
from permafrost.stages.workspace import Workspace, open_workspace
from permafrost.tensors import load_tasks, load_tensors, save_tensors


def read_maps(seed: int, evidence: Evidence) -> tuple[Evidence, list[str]]:
    """Add the maps that the stages before have written; return the classes' names too.

    Raises
    ------
    InputError
        If a file is damaged or of another network.
    """
    saliency, about = load_tensors(seed_file(SALIENCY, seed))
    filters, _ = load_tensors(seed_file(FILTERS, seed))
    require("maps" in saliency, seed_file(SALIENCY, seed), "holds no class maps")
    for name, weight in evidence.weights.items():
        maps = filters.get(f"{name}/maps")
        whole = maps is not None and len(maps) == len(weight)
        require(whole, seed_file(FILTERS, seed), f"holds no maps of layer {name}")
    filter_maps = {name: filters[f"{name}/maps"] for name in evidence.weights}
    evidence = replace(evidence, filter_maps=filter_maps, class_maps=saliency["maps"])
    return evidence, about["classes"]


def measure_responses(
    workspace: Workspace, seed: int, network: TaskNetwork, class_maps: Tensor | None
) -> Mapping[str, Mapping[str, Tensor]]:
    """Show the network the first task's training images, if a criterion asks for it."""
    criteria = [metric for metric in workspace.params.rank.metrics if needs_images(metric)]
    if not criteria:
        return {}
    sequence = load_tasks(seed_file(TASKS, seed))
    task = sequence.tasks[0]
    batches = Batches(task.train, sequence.normalization, workspace.device)
    model = network.view("shared", 0, 1)
    return method.show_images(model, batches, len(task.classes), criteria, class_maps)


def run(seed: int) -> None:
    """Write scores and orders by every metric, and a picture of the best and worst filters."""
    with open_workspace("rank", seed) as workspace:
        params = workspace.params
        network = workspace.first_network(seed)
        evidence, classes = read_maps(seed, network_evidence(network, seed))
        inputs = [FIRST, SALIENCY, FILTERS]
        inputs += [TASKS] if any(map(needs_images, params.rank.metrics)) else []
        tensors, about = workspace.obtain(
            "rank",
            params.rank.model_dump() | {"seed": seed},
            [seed_file(folder, seed) for folder in inputs],
            [
                method.__name__,
                *map(CRITERIA.home, params.rank.metrics),
            ],
            lambda: _rank(workspace, seed, network, evidence),
        )
        save_tensors(seed_file(RANKS, seed), tensors, about)
        # Other criteria look at no maps: there is nothing to show beside each other.
        shown = next((metric for metric in params.rank.metrics if needs_maps(metric)), "mse")
        draw_best_and_worst(seed_file(RANK_PICTURES, seed, ".png"), classes, evidence, shown)


def _rank(workspace: Workspace, seed: int, network: TaskNetwork, evidence: Evidence) -> Result:
    """Return the scores and orders of every layer's filters by every metric."""
    measured = measure_responses(workspace, seed, network, evidence.class_maps)
    evidence = replace(evidence, class_scores=measured)
    config = explain_config(workspace.params)
    tensors: dict[str, Tensor] = {}
    for metric in workspace.params.rank.metrics:
        scores, orders = method.order_layers(metric, evidence, config)
        tensors |= {f"{metric}/{name}/scores": values for name, values in scores.items()}
        tensors |= {f"{metric}/{name}/order": values for name, values in orders.items()}
    return tensors, {"metrics": workspace.params.rank.metrics}
