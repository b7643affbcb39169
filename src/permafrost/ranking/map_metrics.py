"""Map metrics: how much a filter's map looks like a class's map.

A map metric is a pure function of filter maps (F, H, W) and class maps (C, H, W) to scores (F, C).
It declares by :func:`map_metric` whether a higher score means more alike. All metrics here compare
maps that are min-max rescaled one by one, work in float64 and return float32, so that the rounding
of a sum's last bits does not decide between filters that are equal.

The filter maps themselves do depend on rounding in deep layers: two correct float32 programs order
the deepest layer's filters differently, and two start images more so
(:func:`permafrost.explain.visualize_filters`, Notes). A map metric's order of deep filters is to
that extent chance.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from permafrost.ranking.criteria import check_map_pair, map_metric

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1 = 0.01**2
SSIM_C2 = 0.03**2

# Elements that a temporary of one chunk may hold: 2**18 float64 numbers are 2 MiB, which stay in
# the cores' caches.
_CHUNK_ELEMENTS = 2**18


@map_metric(higher_is_better=False)
def mse(filter_maps: Tensor, class_maps: Tensor) -> Tensor:
    """Mean squared difference of the min-max rescaled maps.

    A constant map is rescaled to zeros; two constant maps score 0.

    Parameters
    ----------
    filter_maps, class_maps : Tensor (F, H, W) and (C, H, W)
        Maps of any scale.

    Returns
    -------
    scores : Tensor (F, C)
        float32 in 0..1; 0 for maps that are equal up to scale and offset.

    Raises
    ------
    ValueError
        If the shapes do not fit or a map is not finite.
    """
    filters, classes = _rescaled_pair(filter_maps, class_maps)
    # Summing the squares of the differences keeps equal maps at exactly 0, which a matrix product
    # of the maps would not.
    distance = torch.cdist(filters, classes, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.square() / filters.shape[1]).float()


@map_metric(higher_is_better=True)
def pearson(filter_maps: Tensor, class_maps: Tensor) -> Tensor:
    """Pearson's correlation over the positions: the mean product of the z-scored maps.

    A constant map has correlation 0 with every map.

    Parameters
    ----------
    filter_maps, class_maps : Tensor (F, H, W) and (C, H, W)
        Maps of any scale.

    Returns
    -------
    scores : Tensor (F, C)
        float32 in -1..1; 1 for maps that are equal up to scale and offset.

    Raises
    ------
    ValueError
        If the shapes do not fit or a map is not finite.
    """
    # Rescaling changes no correlation and keeps the variance of tiny maps from underflowing.
    return _correlation(*_rescaled_pair(filter_maps, class_maps))


@map_metric(higher_is_better=True)
def cosine(filter_maps: Tensor, class_maps: Tensor) -> Tensor:
    """Cosine of the angle between the min-max rescaled maps as vectors.

    A constant map is rescaled to zeros and scores 0 with every map.

    Parameters
    ----------
    filter_maps, class_maps : Tensor (F, H, W) and (C, H, W)
        Maps of any scale.

    Returns
    -------
    scores : Tensor (F, C)
        float32 in 0..1; 1 for maps that are equal up to scale and offset.

    Raises
    ------
    ValueError
        If the shapes do not fit or a map is not finite.
    """
    return _cosine(*_rescaled_pair(filter_maps, class_maps))


@map_metric(higher_is_better=True)
def spearman(filter_maps: Tensor, class_maps: Tensor) -> Tensor:
    """Spearman's rank correlation: Pearson's correlation of the ranks, ties sharing their mean.

    A constant map has correlation 0 with every map. Otherwise equal to ``scipy.stats.spearmanr``.

    Parameters
    ----------
    filter_maps, class_maps : Tensor (F, H, W) and (C, H, W)
        Maps of any scale.

    Returns
    -------
    scores : Tensor (F, C)
        float32 in -1..1; 1 for maps that order the positions alike.

    Raises
    ------
    ValueError
        If the shapes do not fit or a map is not finite.
    """
    check_map_pair(filter_maps, class_maps)
    filters, classes = (_average_ranks(maps.flatten(1)) for maps in (filter_maps, class_maps))
    return _correlation(filters, classes)


@map_metric(higher_is_better=True)
def ssim(filter_maps: Tensor, class_maps: Tensor) -> Tensor:
    """Structural similarity of the min-max rescaled maps (Wang et al. 2004).

    The window is Gaussian, 11 x 11, sigma 1.5; the score is the mean over the positions where the
    window lies wholly inside the map; K1 is 0.01, K2 0.03 and the data range 1. So it equals
    scikit-image's ``structural_similarity`` with ``gaussian_weights=True`` and
    ``use_sample_covariance=False``. On maps with a side below 11 the window is the largest odd one
    that fits, with the same sigma. A constant map is rescaled to zeros; two constant maps score 1.

    Parameters
    ----------
    filter_maps, class_maps : Tensor (F, H, W) and (C, H, W)
        Maps of any scale.

    Returns
    -------
    scores : Tensor (F, C)
        float32 in -1..1; 1 for maps that are equal up to scale and offset.

    Raises
    ------
    ValueError
        If the shapes do not fit or a map is not finite.

    References
    ----------
    Wang, Bovik, Sheikh & Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", IEEE Transactions on Image Processing 13(4), 2004.
    """
    filters, classes = _rescaled_pair(filter_maps, class_maps)
    height, width = filter_maps.shape[1:]
    side = min(SSIM_WINDOW, height, width)
    side -= 1 - side % 2
    # The window is a product of two, down and across: two matrix products take local means.
    down, across = (_sliding_window(n, side).to(filters.device) for n in (height, width))

    def local_mean(flat: Tensor) -> Tensor:
        maps = flat.unflatten(-1, (height, width))
        return (down @ (maps @ across.T)).flatten(-2)

    # E[x^2] - E[x]^2 is safe in float64: the maps lie in 0..1 and C2 is far above its rounding.
    class_mean = local_mean(classes)
    class_var = local_mean(classes.square()) - class_mean.square()
    total = filters.new_empty(len(filters), len(classes))
    for rows in _chunks(len(filters), classes.numel()):
        chunk = filters[rows, None]
        mean = local_mean(chunk)
        var = local_mean(chunk.square()) - mean.square()
        means = mean * class_mean
        covariance = local_mean(chunk * classes).sub_(means)
        above = means.mul_(2).add_(SSIM_C1).mul_(covariance.mul_(2).add_(SSIM_C2))
        below = (mean.square() + class_mean.square()).add_(SSIM_C1)
        below.mul_((var + class_var).add_(SSIM_C2))
        total[rows] = above.div_(below).mean(-1)
    return total.float()


@map_metric(higher_is_better=True)
def sim(filter_maps: Tensor, class_maps: Tensor) -> Tensor:
    """Similarity (histogram intersection): the sum over the positions of min(P, Q).

    P and Q are the min-max rescaled maps divided by their sum; a constant map is the uniform
    distribution, so two constant maps score 1.

    Parameters
    ----------
    filter_maps, class_maps : Tensor (F, H, W) and (C, H, W)
        Maps of any scale.

    Returns
    -------
    scores : Tensor (F, C)
        float32 in 0..1; 1 for equal distributions, 0 for disjoint ones.

    Raises
    ------
    ValueError
        If the shapes do not fit or a map is not finite.

    References
    ----------
    Bylinskii, Judd, Oliva, Torralba & Durand, "What do different evaluation metrics tell us about
    saliency models?", IEEE TPAMI 41(3), 2019.
    """
    filters, classes = (_distributions(m) for m in _rescaled_pair(filter_maps, class_maps))
    # min(p, q) = (p + q - |p - q|) / 2, and both sum to 1.
    return (1 - torch.cdist(filters, classes, p=1.0) / 2).clamp(0, 1).float()


@map_metric(higher_is_better=False)
def js(filter_maps: Tensor, class_maps: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats: H((P + Q) / 2) - (H(P) + H(Q)) / 2 (Lin 1991).

    P and Q are the min-max rescaled maps divided by their sum; a constant map is the uniform
    distribution, so two constant maps score 0. It is the square of SciPy's ``jensenshannon``.

    Parameters
    ----------
    filter_maps, class_maps : Tensor (F, H, W) and (C, H, W)
        Maps of any scale.

    Returns
    -------
    scores : Tensor (F, C)
        float32 in 0..ln 2; 0 for equal distributions, ln 2 for disjoint ones.

    Raises
    ------
    ValueError
        If the shapes do not fit or a map is not finite.

    References
    ----------
    Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on Information
    Theory 37(1), 1991.
    """
    filters, classes = (_distributions(m) for m in _rescaled_pair(filter_maps, class_maps))
    mixed = filters.new_empty(len(filters), len(classes))
    for rows in _chunks(len(filters), classes.numel()):
        doubled = filters[rows, None] + classes
        # H(d / 2) = ln 2 - sum(d ln d) / 2, since d sums to 2; 0 ln 0 is 0.
        logs = doubled.clamp(min=torch.finfo(doubled.dtype).tiny).log_()
        mixed[rows] = math.log(2) - logs.mul_(doubled).sum(dim=-1) / 2
    divergence = mixed - (_entropy(filters)[:, None] + _entropy(classes)) / 2
    return divergence.clamp(min=0).float()


def _rescaled_pair(filter_maps: Tensor, class_maps: Tensor) -> tuple[Tensor, Tensor]:
    """Check, flatten to (N, H*W) and rescale both."""
    check_map_pair(filter_maps, class_maps)
    return _rescale(filter_maps.flatten(1)), _rescale(class_maps.flatten(1))


def _rescale(rows: Tensor) -> Tensor:
    """Min-max rescale each row to 0..1 in float64; a constant row becomes zeros."""
    low, high = (bound.double() for bound in torch.aminmax(rows, dim=1, keepdim=True))
    spread = torch.where(high > low, high - low, 1)
    return (rows.double() - low).div_(spread)


def _cosine(filters: Tensor, classes: Tensor) -> Tensor:
    """Cosine of every pair of rows; 0 where a row is all zeros."""
    return (functional.normalize(filters) @ functional.normalize(classes).T).clamp(-1, 1).float()


def _correlation(filters: Tensor, classes: Tensor) -> Tensor:
    """Pearson's correlation of every pair of rescaled rows."""
    return _cosine(_centred(filters), _centred(classes))


def _centred(rows: Tensor) -> Tensor:
    """Subtract each row's mean."""
    return rows - rows.mean(dim=1, keepdim=True)


def _average_ranks(rows: Tensor) -> Tensor:
    """Ranks (from 1) of each row's values in float64; ties share the mean of their ranks."""
    # NumPy's sort uses vector instructions, several times as fast as PyTorch's on a CPU.
    # It does not know bfloat16.
    wide = torch.promote_types(rows.dtype, torch.float32) if rows.is_floating_point() else None
    values = rows.detach().to("cpu", wide).numpy()
    order = np.argsort(values, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    starts = np.ones(values.shape, dtype=bool)  # where a run of equal values begins
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    in_order = np.tile(np.arange(1.0, values.shape[1] + 1), (len(values), 1))
    tied = ~starts.all(axis=1)
    in_order[tied] = _shared_ranks(starts[tied])
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, in_order, axis=1)
    return torch.from_numpy(ranks).to(rows.device)


def _shared_ranks(starts: np.ndarray) -> np.ndarray:
    """Return the ranks of ordered values, given where each run of equal ones begins."""
    place = np.arange(starts.shape[1])
    ends = np.roll(starts, -1, axis=1)
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, place, place[-1])[:, ::-1], axis=1)[:, ::-1]
    return (first + last) / 2 + 1


def _distributions(rows: Tensor) -> Tensor:
    """Divide each rescaled row by its sum; a row of zeros becomes uniform."""
    total = rows.sum(dim=1, keepdim=True)
    return torch.where(total > 0, rows / total, 1 / rows.shape[1])


def _entropy(distributions: Tensor) -> Tensor:
    """Shannon entropy in nats over the last dimension."""
    return -torch.xlogy(distributions, distributions).sum(dim=-1)


def _sliding_window(length: int, side: int) -> Tensor:
    """Return (length - side + 1, length): each row a Gaussian of sum 1, one place further."""
    offsets = torch.arange(side, dtype=torch.float64) - side // 2
    weights = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    window = torch.zeros(length - side + 1, length, dtype=torch.float64)
    for place, row in enumerate(window):
        row[place : place + side] = weights
    return window


def _chunks(length: int, elements_each: int) -> list[slice]:
    """Cut 0..length into slices of which a temporary stays within the chunk's elements."""
    step = max(1, _CHUNK_ELEMENTS // elements_each)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
