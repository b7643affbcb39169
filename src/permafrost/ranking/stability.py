"""How far a criterion's ranking can be trusted: what it depends on, and what it ought to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from permafrost.data import Batches, LabeledImages, Normalization
from permafrost.evaluation.accuracy import accuracy
from permafrost.freezing import plain_copy
from permafrost.ranking.ablation import silenced
from permafrost.ranking.criteria import needs_images, needs_maps
from permafrost.ranking.features import feature_layers
from permafrost.ranking.method import ExplainConfig, score_network
from permafrost.ranking.selection import order_filters
from permafrost.seeding import generator
from permafrost.shares import count_frozen

TRUTH = "ablation"
SILENCED = (0.05, 0.1, 0.25)

Scores = Mapping[str, Tensor]
Agreement = dict[str, float]


@dataclass(frozen=True)
class Subject:
    """A network that has learned a task, and what its filters are ranked by.

    Attributes
    ----------
    model : nn.Module
        The classifier of the task.
    images : LabeledImages
        The task's training images.
    test : LabeledImages
        Others, to measure what silencing costs.
    classes : int
        C.
    normalization : Normalization
        Of the images.
    config : ExplainConfig
        How the network is explained and filters are ordered.
    seed : int
        Of all draws.
    device : torch.device
        Where to compute.
    """

    model: nn.Module
    images: LabeledImages
    test: LabeledImages
    classes: int
    normalization: Normalization
    config: ExplainConfig
    seed: int
    device: torch.device

    def batches(self, images: LabeledImages | None = None) -> Batches:
        """Return images to be shown; by default the training images."""
        return Batches(images or self.images, self.normalization, self.device)

    def scores(self, criterion: str) -> Scores:
        """Return the scores (F, C) or (F, 1) of each layer; higher is better."""
        shown = self.batches()
        if next(self.model.parameters()).dtype == torch.float64:
            shown = _InDouble(self.images, self.normalization, self.device)
        about = (self.model, shown, self.classes, self.normalization)
        return score_network(*about, criterion, self.config, self.seed)

    def orders(self, criterion: str) -> Scores:
        """Return each layer's filters, the best first; without layers of which all score alike."""
        return {
            name: order_filters(values, self.config.aggregate)
            for name, values in self.scores(criterion).items()
            if len(values) == 1 or (values != values[:1]).any()
        }


class _InDouble(Batches):
    """Batches in float64, of images that are normalised as ever."""

    def ordered(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images as they are, in their order."""
        return ((images.double(), labels) for images, labels in super().ordered(batch_size))


def check_stability(
    subject: Subject, criterion: str, untrained: nn.Module
) -> dict[str, dict[str, Agreement]]:
    """Rank anew where little, or all that counts, has changed, and compare.

    ``halves``: by disjoint halves of the images, with each other; the others are compared with the
    ranking itself. ``start_image``: the pictures grow from another start image. ``float64``: all is
    computed in it. These ought to agree. ``random_weights``: of the untrained network, and
    ``random_labels``: with labels permuted over the images, after the sanity checks of Adebayo et
    al. (2018): a ranking that explains what was learned ought not to agree with these.

    Parameters
    ----------
    subject : Subject
        What is ranked.
    criterion : str
        By what; checks of which it does not depend on what changes are left out, and so are layers
        of which all filters have the same score.
    untrained : nn.Module
        The same network before it had learned anything.

    Returns
    -------
    dict of str to dict
        By check and layer what :func:`agreement` gives.

    References
    ----------
    Adebayo, Gilmer, Muelly, Goodfellow, Hardt & Kim, "Sanity checks for saliency maps", NeurIPS
    2018.
    """
    whole = subject.orders(criterion)
    looks = needs_maps(criterion) or needs_images(criterion)
    compared: dict[str, tuple[Scores, Scores]] = {}
    if looks:
        one, other = (
            replace(subject, images=half).orders(criterion) for half in _halves(subject.images)
        )
        compared["halves"] = one, other
        double = replace(subject, model=plain_copy(subject.model).double())
        compared["float64"] = whole, double.orders(criterion)
        mixed = replace(subject, images=_mixed(subject.images, subject.seed))
        compared["random_labels"] = whole, mixed.orders(criterion)
    if needs_maps(criterion) and subject.config.pictures == "maximised":
        other_start = replace(
            subject.config, start_seed=subject.config.start_seed + subject.config.starts
        )
        compared["start_image"] = whole, replace(subject, config=other_start).orders(criterion)
    compared["random_weights"] = whole, replace(subject, model=untrained).orders(criterion)
    found = {
        check: {name: agreement(left[name], right[name]) for name in left if name in right}
        for check, (left, right) in compared.items()
    }
    return {check: layers for check, layers in found.items() if layers}


def agreement(one: Tensor, other: Tensor) -> Agreement:
    """Compare two orders of a layer's filters.

    Returns
    -------
    dict of str to float
        ``spearman``: the rank correlation, −1..1, 1 of a single filter. ``top_half``: the part of
        the first half of one that is in the first half of the other, 0..1; about 0.5 by chance.
    """
    count = len(one)
    half = max(1, count // 2)
    common = set(one[:half].tolist()) & set(other[:half].tolist())
    places = torch.stack([one.cpu().argsort(), other.cpu().argsort()])
    return {"spearman": _correlation(*places.double()), "top_half": len(common) / half}


def compare_with_truth(scores: Scores, truth: Scores) -> dict[str, list[float]]:
    """Return Spearman's correlation of a criterion's scores with those of ``ablation``.

    Returns
    -------
    dict of str to list of float
        By layer, for each class; −1..1, 0 where one side is the same for all filters.
    """
    return {
        name: [
            _correlation(_ranks(mine), _ranks(true))
            for mine, true in zip(
                scores[name].cpu().expand_as(known.cpu()).T, known.cpu().T, strict=True
            )
        ]
        for name, known in truth.items()
    }


def accuracy_without_worst(subject: Subject, orders: Scores) -> dict[str, float]:
    """Return the test accuracy when the last 5, 10 and 25% of every layer's order are silenced.

    Returns
    -------
    dict of str to float
        By the part, ``0.0`` for the whole network; 0..1.
    """
    batches = subject.batches(subject.test)
    layers = feature_layers(subject.model, next(batches.ordered(1))[0])
    found = {}
    for part in (0.0, *SILENCED):
        masks = {
            name: torch.zeros(len(order), dtype=torch.bool).index_fill(
                0, order.cpu()[len(order) - count_frozen(part, len(order)) :], True
            )
            for name, order in orders.items()
        }
        with silenced(subject.model, layers, masks):
            found[f"{part}"] = accuracy(subject.model, batches, subject.classes).overall
    return found


def _halves(images: LabeledImages) -> list[LabeledImages]:
    """Divide images in two, the images of each class in turns."""
    turn = torch.zeros_like(images.labels)
    for label in images.labels.unique():
        mine = images.labels == label
        turn[mine] = torch.arange(int(mine.sum())) % 2
    return [LabeledImages(images.images[turn == t], images.labels[turn == t]) for t in (0, 1)]


def _mixed(images: LabeledImages, seed: int) -> LabeledImages:
    order = torch.randperm(len(images.labels), generator=generator(seed, "mixed labels"))
    return LabeledImages(images.images, images.labels[order])


def _ranks(values: Tensor) -> Tensor:
    """Return ranks, the mean of their places for equal values."""
    _, where, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[where]


def _correlation(one: Tensor, other: Tensor) -> float:
    """Return Pearson's correlation; 0 where one side does not vary, 1 of a single value."""
    if len(one) == 1:
        return 1.0
    left, right = one - one.mean(), other - other.mean()
    size = (left.square().sum() * right.square().sum()).sqrt()
    return float((left * right).sum() / size) if size > 0 else 0.0
