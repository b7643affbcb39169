"""Explanations of convolutional networks: saliency maps and filter visualisation.

Both work on any network of images (N, 3, H, W) to logits (N, C) and leave nothing of it changed.

Examples
--------
>>> import torch
>>> from torchvision.models import resnet18
>>> from permafrost.explain import conv_layers, fullgrad, saliency_maps
>>> from permafrost.explain import start_image, visualize_filters
>>> model = resnet18(weights=None)
>>> images, targets = torch.randn(2, 3, 64, 64), torch.tensor([3, 7])
>>> fullgrad(model, images, targets).shape
torch.Size([2, 64, 64])
>>> saliency_maps(model, images, targets, "gradcam").shape
torch.Size([2, 64, 64])
>>> start = start_image(64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), seed=0)
>>> layer = list(conv_layers(model))[3]
>>> visualize_filters(model, layer, filters=[0, 5], start=start, steps=3).shape
torch.Size([2, 3, 64, 64])
"""

from permafrost.explain.attribution import (
    gradcam,
    guided_backprop,
    input_x_gradient,
    integrated_gradients,
)
from permafrost.explain.fullgrad import (
    completeness_error,
    fullgrad,
    is_piecewise_linear,
    simple_fullgrad,
    smooth_fullgrad,
)
from permafrost.explain.methods import SALIENCY_METHODS, Reading, saliency_method
from permafrost.explain.saliency import ClassSaliency, class_saliency, saliency_maps
from permafrost.explain.showing import show, show_filters
from permafrost.explain.visualize import (
    Reduction,
    heat_maps,
    natural_pictures,
    start_image,
    strongest_images,
    visualize_filters,
)
from permafrost.models.units import conv_layers

__all__ = [
    "SALIENCY_METHODS",
    "ClassSaliency",
    "Reading",
    "Reduction",
    "class_saliency",
    "completeness_error",
    "conv_layers",
    "fullgrad",
    "gradcam",
    "guided_backprop",
    "heat_maps",
    "input_x_gradient",
    "integrated_gradients",
    "is_piecewise_linear",
    "natural_pictures",
    "saliency_maps",
    "saliency_method",
    "show",
    "show_filters",
    "simple_fullgrad",
    "smooth_fullgrad",
    "start_image",
    "strongest_images",
    "visualize_filters",
]
