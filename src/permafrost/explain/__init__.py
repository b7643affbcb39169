"""Explanations of convolutional networks: FullGrad saliency and filter visualisation.

Both work on any network of images (N, 3, H, W) to logits (N, C) and leave nothing of it changed.

Examples
--------
>>> import torch
>>> from torchvision.models import resnet18
>>> from permafrost.explain import conv_layers, fullgrad, start_image, visualize_filters
>>> model = resnet18(weights=None)
>>> images, targets = torch.randn(2, 3, 64, 64), torch.tensor([3, 7])
>>> fullgrad(model, images, targets).shape
torch.Size([2, 64, 64])
>>> start = start_image(64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), seed=0)
>>> layer = list(conv_layers(model))[3]
>>> visualize_filters(model, layer, filters=[0, 5], start=start, steps=3).shape
torch.Size([2, 3, 64, 64])
"""

from permafrost.explain.fullgrad import (
    ClassSaliency,
    Reading,
    class_saliency,
    completeness_error,
    fullgrad,
    is_piecewise_linear,
)
from permafrost.explain.visualize import (
    Reduction,
    conv_layers,
    heat_maps,
    start_image,
    visualize_filters,
)

__all__ = [
    "ClassSaliency",
    "Reading",
    "Reduction",
    "class_saliency",
    "completeness_error",
    "conv_layers",
    "fullgrad",
    "heat_maps",
    "is_piecewise_linear",
    "start_image",
    "visualize_filters",
]
