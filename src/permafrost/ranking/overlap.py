"""Where filters respond, beside where the classes' saliency maps look."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.ranking.class_scores import checked_labels, watch
from permafrost.ranking.criteria import METRICS, evaluate_metric, network_criterion
from permafrost.ranking.features import feature_layers


@network_criterion(class_maps=True)
def overlap(
    model: nn.Module,
    images_by_batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    class_maps: Tensor,
) -> dict[str, Tensor]:
    """Correlate each filter's mean response to a class's images with the class's saliency map.

    The mean over the class's images of the filter's feature map, before the ReLU, is brought to
    the images' size (bilinear) and compared with the class's map by Pearson's correlation: as the
    metric ``pearson``, with what the filter sees of the class in place of its picture.

    Parameters
    ----------
    model, images_by_batches, classes
        As for :func:`permafrost.ranking.filter_responses`.
    class_maps : Tensor, shape (C, H, W)
        Of the classes.

    Returns
    -------
    scores : dict[str, Tensor (F, C)]
        By layer, -1..1; 0 where a map is constant.
    """
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(classes, dtype=torch.float64)
    layers: dict[str, str] = {}
    for images, given in images_by_batches:
        labels = checked_labels(images, given, classes)
        layers.update(layers or feature_layers(model, images[:1]))
        dtype = images.dtype
        members = F.one_hot(labels, classes).double()

        def add(layer: str, maps: Tensor, _: Tensor, members: Tensor = members) -> None:
            total = (members.T @ maps.double().flatten(1)).view(classes, *maps.shape[1:])
            sums[layer] = sums.get(layer, 0) + total

        watch(model, layers, "logit", images, labels, add)
        counts += members.sum(0).cpu()
    if (missing := (counts == 0).nonzero().flatten().tolist()) or not layers:
        raise ValueError(f"classes without images: {missing}")
    maps = class_maps.to(next(iter(sums.values())))
    return {
        layer: torch.cat(
            [
                _pearson(total / count, class_map)
                for total, count, class_map in zip(sums[layer], counts, maps, strict=True)
            ],
            dim=1,
        ).to(dtype)
        for layer in layers
    }


def _pearson(responses: Tensor, class_map: Tensor) -> Tensor:
    """Correlate maps (F, h, w) with one (H, W): (F, 1)."""
    size = class_map.shape
    large = F.interpolate(responses[None], size, mode="bilinear", align_corners=False)[0]
    return evaluate_metric(METRICS["pearson"], large, class_map[None])
