"""The method, in one place: explain a network, score its filters, order them, freeze the first.

The stages of the workflow take the steps one by one and keep what lies between; before a third or
later task :func:`rank_network` takes them at once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from permafrost.data import Batches, Normalization
from permafrost.devices import images_at_once
from permafrost.errors import InputError
from permafrost.explain import (
    ClassSaliency,
    Reading,
    Reduction,
    class_saliency,
    conv_layers,
    heat_maps,
    is_piecewise_linear,
    natural_pictures,
    start_image,
    visualize_filters,
)
from permafrost.ranking.class_scores import filter_responses
from permafrost.ranking.criteria import (
    needs_class_maps,
    needs_images,
    needs_maps,
    score_filters,
)
from permafrost.ranking.evidence import Evidence, combine_classes, network_evidence
from permafrost.ranking.selection import frozen_mask, order_filters

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
        Of the saliency maps, a name in ``SALIENCY_METHODS`` or ``module:function``.
    reading : {"layer", "channel"}
        Of FullGrad.
    steps, lr, weight_decay : int, float, float
        Of the activation maximisation.
    start_seed : int
        Draws the start image, the same for all filters.
    starts : int
        From how many start images the pictures grow, seeds from ``start_seed`` on; pictures and
        maps are their means.
    jitter : int
        By how many pixels an image is shifted at random before each step.
    pictures : {"maximised", "natural"}
        ``natural``: a picture is the mean of the nine training images that the filter answers to
        most strongly; steps, starts and jitter are not read.
    heat_map : {"change", "intensity", "max"}
        How a filter's picture becomes one map; a natural one changes the mean colour.
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
    starts: int = 1
    jitter: int = 0
    pictures: str = "maximised"
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
    size: tuple[int, int],
    normalization: Normalization,
    config: ExplainConfig,
    batches: Batches,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Visualise every filter of every convolution.

    Parameters
    ----------
    model : nn.Module
        The classifier.
    size : (int, int)
        Height and width of its images.
    normalization : Normalization
        Of its images.
    config : ExplainConfig
        Start image, steps, learning rate and heat map.
    batches : Batches
        The task's training images, for natural pictures.
    on_batch : callable, optional
        Told how many filters were finished, to show progress.

    Returns
    -------
    pictures : dict of str to Tensor, shape (F, 3, H, W)
        Of each layer's filters, in normalised units.
    maps : dict of str to Tensor, shape (F, H, W)
        Each picture as one map.
    """
    layers = list(conv_layers(model))
    if config.pictures == "natural":
        pictures = natural_pictures(model, layers, InOrder(batches))
        grey = next(iter(pictures.values())).new_zeros(3, *size)
        return pictures, {n: heat_maps(p, grey, config.heat_map) for n, p in pictures.items()}
    grown = [
        _grown(model, layers, size, normalization, config, seed, on_batch)
        for seed in range(config.start_seed, config.start_seed + config.starts)
    ]
    pictures, maps = (_mean(found) for found in zip(*grown, strict=True))
    return pictures, maps


def _grown(
    model: nn.Module,
    layers: Sequence[str],
    size: tuple[int, int],
    normalization: Normalization,
    config: ExplainConfig,
    seed: int,
    on_batch: Callable[[int], None] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the pictures that grow from one start image, and their maps."""
    start = start_image(size, normalization.mean, normalization.std, seed)
    start = start.to(next(model.parameters()))
    pictures = {
        name: visualize_filters(
            model,
            name,
            start=start,
            steps=config.steps,
            lr=config.lr,
            weight_decay=config.weight_decay,
            jitter=config.jitter,
            jitter_seed=seed,
            on_batch=on_batch,
        )
        for name in layers
    }
    maps = {name: heat_maps(p, start, config.heat_map) for name, p in pictures.items()}
    return pictures, maps


def _mean(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each tensor; of one alone, itself."""
    first, *others = found
    if not others:
        return dict(first)
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in first}


def show_images(
    model: nn.Module,
    batches: Batches,
    classes: int,
    criteria: Sequence[str],
    class_maps: Tensor | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Score the filters for every class by criteria that look at images, as `filter_responses`."""
    return filter_responses(model, InOrder(batches), classes, criteria, class_maps)


def in_order(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Return images in their order, as many at once as suit the device."""
    return batches.ordered(images_at_once(batches.images, on_cpu=64))


@dataclass(frozen=True)
class InOrder:
    """One task's images in their order, as often as they are asked for."""

    batches: Batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return in_order(self.batches)


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


def score_network(
    model: nn.Module,
    batches: Batches,
    classes: int,
    normalization: Normalization,
    criterion: str,
    config: ExplainConfig,
    seed: int,
) -> dict[str, Tensor]:
    """Explain a classifier on one task's training images and score its filters.

    Returns
    -------
    dict of str to Tensor, shape (F, C) or (F, 1)
        Higher is better.

    Raises
    ------
    IncompleteSaliency
        As :func:`explain_classes`, if the criterion looks at maps.
    """
    evidence = network_evidence(model, seed)
    if needs_maps(criterion) or needs_class_maps(criterion):
        saliency = explain_classes(model, InOrder(batches), classes, config)
        evidence = replace(evidence, class_maps=saliency.maps)
    if needs_maps(criterion):
        height, width = batches.images.shape[2:]
        _, maps = visualize_network(model, (height, width), normalization, config, batches)
        evidence = replace(evidence, filter_maps=maps)
    elif needs_images(criterion):
        shown = show_images(model, batches, classes, [criterion], evidence.class_maps)
        evidence = replace(evidence, class_scores=shown)
    scores, _ = order_layers(criterion, evidence, config)
    return scores


def rank_network(
    model: nn.Module,
    batches: Batches,
    classes: int,
    normalization: Normalization,
    criterion: str,
    config: ExplainConfig,
    seed: int,
) -> dict[str, Tensor]:
    """Order a classifier's filters by their scores; as :func:`score_network`.

    Returns
    -------
    dict of str to Tensor of int64, shape (F,)
        Filters of each layer, the first to freeze first.
    """
    scores = score_network(model, batches, classes, normalization, criterion, config, seed)
    return {
        name: order_filters(values, config.aggregate, config.reverse)
        for name, values in scores.items()
    }


def frozen_masks(
    orders: Mapping[str, Tensor], pct: float, before: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Mark the first free filters of every layer's order as frozen.

    Parameters
    ----------
    orders : mapping of str to Tensor (F,)
        As :func:`rank_network` gives them.
    pct : float
        Share of the free filters to freeze, 0..1.
    before : mapping of str to Tensor of bool, optional
        By layer, the filters that are frozen already and stay so.

    Returns
    -------
    dict of str to Tensor of bool, shape (F,)
    """
    taken = before or {}
    return {name: frozen_mask(order, pct, taken.get(name)) for name, order in orders.items()}
