"""The VGG family for small images (Simonyan & Zisserman 2015)."""

import torch
from torch import nn

from permafrost.models.networks import network

# Convolutions of each block, a max-pooling after each (table 1).
_DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
_FILTERS = (64, 128, 256, 512, 512)
_LEAST_SIDE = 32


@network("vgg11")
def vgg11(image_size: tuple[int, int], width: float, batch_norm: bool) -> nn.Module:
    """Eight convolutions."""
    return _vgg("vgg11", image_size, width, batch_norm)


@network("vgg13")
def vgg13(image_size: tuple[int, int], width: float, batch_norm: bool) -> nn.Module:
    """Ten convolutions."""
    return _vgg("vgg13", image_size, width, batch_norm)


@network("vgg16")
def vgg16(image_size: tuple[int, int], width: float, batch_norm: bool) -> nn.Module:
    """Thirteen convolutions."""
    return _vgg("vgg16", image_size, width, batch_norm)


@network("vgg19")
def vgg19(image_size: tuple[int, int], width: float, batch_norm: bool) -> nn.Module:
    """Sixteen convolutions."""
    return _vgg("vgg19", image_size, width, batch_norm)


def _vgg(name: str, image_size: tuple[int, int], width: float, batch_norm: bool) -> nn.Module:
    """Build the convolutions, exactly torchvision's, with weights drawn as it draws them.

    They are built here, since importing torchvision takes every stage seconds. Five poolings halve
    the image, rounded down; of images below 32 pixels rounded up, so that the last BatchNorm sees
    at least 2 x 2 positions of images from 17 pixels on: a batch of one image then has a variance.
    """
    channels = [max(1, round(filters * width)) for filters in _FILTERS]
    with torch.random.fork_rng(devices=[]):  # the layers' default weights are not kept
        features = _convolutions(
            _DEPTHS[name], channels, batch_norm, is_small=min(image_size) < _LEAST_SIDE
        )
    _initialise(features)
    return features


def _convolutions(
    depths: tuple[int, ...], channels: list[int], batch_norm: bool, is_small: bool
) -> nn.Sequential:
    """Stack the layers in torchvision's order, so that its layer names hold too."""
    layers: list[nn.Module] = []
    inputs = 3
    for depth, outputs in zip(depths, channels, strict=True):
        for _ in range(depth):
            layers.append(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, dtype=torch.float32))
            if batch_norm:
                layers.append(nn.BatchNorm2d(outputs, dtype=torch.float32))
            layers.append(nn.ReLU(inplace=True))
            inputs = outputs
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=is_small))
    return nn.Sequential(*layers)


def _initialise(features: nn.Module) -> None:
    """Draw weights as ``torchvision.models.VGG`` does (He et al. 2015, fan-out)."""
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
