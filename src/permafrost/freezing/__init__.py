"""Freezing: filter masks and the layers that honour them.

>>> import torch
>>> from torchvision.models import resnet18
>>> from permafrost.freezing import frozen_filters
>>> model = resnet18(weights=None)
>>> mask = torch.zeros(64, dtype=torch.bool)
>>> mask[:32] = True
>>> with frozen_filters(model, {"conv1": mask}):
...     optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
...     model(torch.zeros(2, 3, 64, 64)).sum().backward()
...     optimizer.step()
"""

from permafrost.freezing.freeze import FilterMasks, batch_norm_after, frozen_filters
from permafrost.freezing.layers import BATCH_NORM_FREEZES, BatchNormFreeze
from permafrost.freezing.weights import WeightMasks, current_weights, frozen_weights, plain_copy

__all__ = [
    "BATCH_NORM_FREEZES",
    "BatchNormFreeze",
    "FilterMasks",
    "WeightMasks",
    "batch_norm_after",
    "current_weights",
    "frozen_filters",
    "frozen_weights",
    "plain_copy",
]
