"""An example of a metric of your own.

Add ``custom.centre_distance:centre_distance`` to ``rank.metrics``, and name it in
``freeze.metric`` or ``sweep.metrics``.
"""

import torch
from torch import Tensor

from permafrost.ranking import map_metric


@map_metric(higher_is_better=False)
def centre_distance(filter_maps: Tensor, class_maps: Tensor) -> Tensor:
    """Distance between the maps' centres of mass, in pixels: (F, H, W), (C, H, W) to (F, C)."""
    return torch.cdist(_centres(filter_maps), _centres(class_maps))


def _centres(maps: Tensor) -> Tensor:
    mass = (
        maps - maps.amin((1, 2), keepdim=True) + 1e-12
    )  # a constant map has its centre in the middle
    total = mass.sum((1, 2))
    rows = torch.arange(maps.shape[1], dtype=maps.dtype)
    columns = torch.arange(maps.shape[2], dtype=maps.dtype)
    return torch.stack(
        [(mass.sum(2) * rows).sum(1) / total, (mass.sum(1) * columns).sum(1) / total], dim=1
    )
