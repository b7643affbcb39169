"""Models: the VGG family for small images and its heads."""

from permafrost.models.scopes import float32_as, measuring
from permafrost.models.vgg import ARCHITECTURES, HEADS, Head, TaskNetwork, build_network

__all__ = [
    "ARCHITECTURES",
    "HEADS",
    "Head",
    "TaskNetwork",
    "build_network",
    "float32_as",
    "measuring",
]
