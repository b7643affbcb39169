"""Where filters respond, beside where the classes' saliency maps look."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.ranking.class_scores import class_means, watch
from permafrost.ranking.criteria import evaluate_metric, network_criterion
from permafrost.ranking.features import feature_layers
from permafrost.ranking.map_metrics import pearson


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
    layers: dict[str, str] = {}
    shapes: dict[str, torch.Size] = {}

    def measure(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        layers.update(layers or feature_layers(model, images[:1]))
        found: dict[str, Tensor] = {}

        def note(layer: str, maps: Tensor, _: Tensor) -> None:
            found[layer], shapes[layer] = maps.flatten(1), maps.shape[1:]

        watch(model, layers, "logit", images, labels, note)
        return found

    means = class_means(measure, images_by_batches, classes)
    return {
        layer: torch.cat(
            [
                _pearson(mean.unflatten(0, shapes[layer]), class_map.to(mean))
                for mean, class_map in zip(means[layer].T, class_maps, strict=True)
            ],
            dim=1,
        ).to(means[layer])
        for layer in layers
    }


def _pearson(responses: Tensor, class_map: Tensor) -> Tensor:
    """Correlate maps (F, h, w) with one (H, W): (F, 1)."""
    size = class_map.shape
    large = F.interpolate(responses[None], size, mode="bilinear", align_corners=False)[0]
    return evaluate_metric(pearson, large, class_map[None])
