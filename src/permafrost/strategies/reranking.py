"""Explain a network and rank its filters: the whole method in one call.

The stages of the workflow take the same steps one by one and keep what lies between; before a third
or later task they are taken here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from permafrost.data import Batches, Normalization
from permafrost.errors import InputError
from permafrost.explain import (
    ClassSaliency,
    Reading,
    Reduction,
    class_saliency,
    conv_layers,
    heat_maps,
    is_piecewise_linear,
    start_image,
    visualize_filters,
)
from permafrost.ranking import (
    RESPONSES,
    Evidence,
    combine_classes,
    filter_responses,
    needs_maps,
    network_evidence,
    order_filters,
    score_filters,
)

BATCH_SIZE = 64
# Relative to the sum of the terms' absolute values, in float32.
COMPLETENESS_BOUND = 1e-4


class IncompleteSaliency(InputError):
    """The terms of a decomposition do not add up to the logit: the maps cannot be trusted."""


@dataclass(frozen=True)
class ExplainConfig:
    """How saliency maps and filter pictures are made and compared.

    Attributes
    ----------
    method : str
        Of the saliency maps, a name in ``SALIENCY_METHODS``.
    reading : {"layer", "channel"}
        Of FullGrad.
    steps, lr, weight_decay : int, float, float
        Of the activation maximisation.
    start_seed : int
        Draws the start image, the same for all filters.
    heat_map : {"change", "intensity", "max"}
        How a filter's picture becomes one map.
    aggregate : {"union", "mean", "max", "combined"}
        How the classes' orders combine.
    reverse : bool
        Whether the worst filters come first.
    """

    method: str = "fullgrad"
    reading: Reading = "layer"
    steps: int = 30
    lr: float = 0.1
    weight_decay: float = 1e-6
    start_seed: int = 0
    heat_map: Reduction = "change"
    aggregate: str = "union"
    reverse: bool = False


def explain_classes(
    model: nn.Module,
    images_by_batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    config: ExplainConfig,
) -> ClassSaliency:
    """Average the saliency maps of each class, and check that they are whole.

    Parameters
    ----------
    model : nn.Module
        The classifier.
    images_by_batches : iterable of (Tensor, Tensor)
        As for :func:`class_saliency`.
    classes : int
        C.
    config : ExplainConfig
        Method and reading.

    Raises
    ------
    IncompleteSaliency
        If the terms of a piecewise-linear network do not add up to its logits.
    """
    method = config.method
    saliency = class_saliency(
        model, images_by_batches, classes, method=method, reading=config.reading
    )
    error = saliency.completeness
    if error is not None and error > COMPLETENESS_BOUND and is_piecewise_linear(model):
        raise IncompleteSaliency(
            f"saliency.method: {method}'s terms miss the logit by {error:.1e}, more than "
            f"{COMPLETENESS_BOUND:.0e}, so that its maps cannot be trusted; choose another method"
        )
    return saliency


def visualize_network(
    model: nn.Module,
    start: Tensor,
    config: ExplainConfig,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Visualise every filter of every convolution.

    Parameters
    ----------
    model : nn.Module
        The classifier.
    start : Tensor, shape (3, H, W)
        The start image, normalised.
    config : ExplainConfig
        Steps and learning rate.
    on_batch : callable, optional
        Told how many filters were finished, to show progress.

    Returns
    -------
    dict of str to Tensor, shape (F, 3, H, W)
        Pictures of each layer's filters, in normalised units.
    """
    return {
        name: visualize_filters(
            model,
            name,
            start=start,
            steps=config.steps,
            lr=config.lr,
            weight_decay=config.weight_decay,
            on_batch=on_batch,
        )
        for name in conv_layers(model)
    }


def order_layers(
    criterion: str, evidence: Evidence, config: ExplainConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Score and order the filters of every layer.

    Returns
    -------
    scores : dict of str to Tensor, shape (F, C) or (F, 1)
        Higher is better.
    orders : dict of str to Tensor of int64, shape (F,)
        Filters, the first to freeze first.
    """
    if config.aggregate == "combined":
        evidence = combine_classes(evidence)
    scores = score_filters(criterion, evidence)
    orders = {
        name: order_filters(values, config.aggregate, config.reverse)
        for name, values in scores.items()
    }
    return scores, orders


def rank_network(
    model: nn.Module,
    batches: Batches,
    classes: int,
    normalization: Normalization,
    criterion: str,
    config: ExplainConfig,
    seed: int,
) -> dict[str, Tensor]:
    """Explain a classifier on one task's training images and order its filters.

    Returns
    -------
    dict of str to Tensor of int64, shape (F,)
        Filters of each layer, the first to freeze first.

    Raises
    ------
    IncompleteSaliency
        As :func:`explain_classes`, if the criterion looks at maps.
    """
    evidence = network_evidence(model, seed)
    if needs_maps(criterion):
        evidence = _with_maps(evidence, model, batches, classes, normalization, config)
    elif criterion in RESPONSES:
        scores = filter_responses(model, batches.ordered(BATCH_SIZE), classes, [criterion])
        evidence = replace(evidence, class_scores=scores)
    _, orders = order_layers(criterion, evidence, config)
    return {name: torch.as_tensor(order) for name, order in orders.items()}


def _with_maps(
    evidence: Evidence,
    model: nn.Module,
    batches: Batches,
    classes: int,
    normalization: Normalization,
    config: ExplainConfig,
) -> Evidence:
    """Add the maps of the filters and of the classes."""
    images, _ = next(batches.ordered(1))
    start = start_image(
        images.shape[-1], normalization.mean, normalization.std, config.start_seed
    ).to(images.device)
    saliency = explain_classes(model, batches.ordered(BATCH_SIZE), classes, config)
    pictures = visualize_network(model, start, config)
    maps = {name: heat_maps(values, start, config.heat_map) for name, values in pictures.items()}
    return replace(evidence, filter_maps=maps, class_maps=saliency.maps)
