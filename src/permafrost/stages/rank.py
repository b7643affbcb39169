"""Stage rank: order every layer's filters by how well they agree with the class maps."""

from torch import Tensor

from permafrost.artifacts import load_tensors, require, save_tensors
from permafrost.experiment import explain_config
from permafrost.explain import conv_layers
from permafrost.pictures import draw_best_and_worst
from permafrost.ranking import CONTROLS, Evidence
from permafrost.stages.workspace import (
    FILTERS,
    RANK_PICTURES,
    RANKS,
    SALIENCY,
    open_stage,
    seed_file,
)
from permafrost.strategies.reranking import order_layers


def read_evidence(seed: int, weights: dict[str, Tensor]) -> tuple[Evidence, list[str]]:
    """Read the maps that the stages before have written; return them and the classes' names.

    Raises
    ------
    InputError
        If a file is damaged or of another network.
    """
    saliency, about = load_tensors(seed_file(SALIENCY, seed))
    filters, _ = load_tensors(seed_file(FILTERS, seed))
    require("maps" in saliency, seed_file(SALIENCY, seed), "holds no class maps")
    for name, weight in weights.items():
        maps = filters.get(f"{name}/maps")
        whole = maps is not None and len(maps) == len(weight)
        require(whole, seed_file(FILTERS, seed), f"holds no maps of layer {name}")
    evidence = Evidence(
        weights=weights,
        filter_maps={name: filters[f"{name}/maps"] for name in weights},
        class_maps=saliency["maps"],
        seed=seed,
    )
    return evidence, about["classes"]


def run(seed: int) -> None:
    """Write scores and orders by every metric, and a picture of the best and worst filters."""
    with open_stage("rank", seed) as workspace:
        params = workspace.params
        layers = conv_layers(workspace.first_network(seed))
        weights = {name: layer.weight.detach().cpu() for name, layer in layers.items()}
        evidence, classes = read_evidence(seed, weights)
        config = explain_config(params)
        tensors: dict[str, Tensor] = {}
        for metric in params.rank.metrics:
            scores, orders = order_layers(metric, evidence, config)
            tensors |= {f"{metric}/{name}/scores": values for name, values in scores.items()}
            tensors |= {f"{metric}/{name}/order": values for name, values in orders.items()}
        save_tensors(seed_file(RANKS, seed), tensors, {"metrics": params.rank.metrics})
        # Controls look at no maps: there is nothing to show beside each other.
        shown = next((m for m in params.rank.metrics if m not in CONTROLS), "mse")
        draw_best_and_worst(seed_file(RANK_PICTURES, seed, ".png"), classes, evidence, shown)
