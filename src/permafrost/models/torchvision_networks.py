"""Networks of torchvision without their last layer; it is imported when one is built.

Images of less than 64 pixels would be a single point after the strides that ImageNet's 224 pixels
want: for them the named networks begin with less of a stride.
"""

from typing import Any

import torch
from torch import nn

from permafrost.errors import InputError
from permafrost.models.networks import NETWORKS, MakeNetwork, network

_LEAST_SIDE = 64

# The families of which docs/networks.md has a member; others were not tried.
FAMILIES = (
    "vgg",
    "resnet",
    "resnext",
    "wide_resnet",
    "densenet",
    "googlenet",
    "inception_v3",
    "squeezenet",
    "mobilenet",
    "efficientnet",
    "convnext",
    "regnet",
)
# Auxiliary classifiers would answer in training too.
_OPTIONS: dict[str, dict[str, Any]] = {
    name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")
}


@network("resnet18")
def resnet18(image_size: tuple[int, int], width: float) -> nn.Module:
    """ResNet-18 (He et al. 2016)."""
    return _resnet("BasicBlock", [2, 2, 2, 2], image_size, width)


@network("resnet34")
def resnet34(image_size: tuple[int, int], width: float) -> nn.Module:
    """ResNet-34."""
    return _resnet("BasicBlock", [3, 4, 6, 3], image_size, width)


@network("resnet50")
def resnet50(image_size: tuple[int, int], width: float) -> nn.Module:
    """ResNet-50, of bottleneck blocks."""
    return _resnet("Bottleneck", [3, 4, 6, 3], image_size, width)


def _resnet(block: str, depths: list[int], image_size: tuple[int, int], width: float) -> nn.Module:
    """Build a ResNet; for small images with a 3 x 3 convolution and no pooling (section 4.2)."""
    from torchvision.models import resnet

    with torch.device("meta" if width != 1 else "cpu"):
        model = resnet.ResNet(getattr(resnet, block), depths)
    is_small = min(image_size) < _LEAST_SIDE
    if width != 1:
        _narrow(model, depths, width)
    if is_small:
        model.conv1 = nn.Conv2d(3, model.bn1.num_features, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    if is_small or width != 1:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return _without_last_layer(model)


def _narrow(model: Any, depths: list[int], width: float) -> None:
    """Build all layers of a ResNet anew, with a factor on their numbers of filters."""
    block = type(model.layer1[0])
    filters = [max(1, round(count * width)) for count in (64, 64, 128, 256, 512)]
    model.inplanes = filters[0]
    model.conv1 = nn.Conv2d(3, filters[0], 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(filters[0])
    for index, (count, depth) in enumerate(zip(filters[1:], depths, strict=True), start=1):
        layer = model._make_layer(block, count, depth, stride=1 if index == 1 else 2)
        setattr(model, f"layer{index}", layer)


@network("mobilenet_v2")
def mobilenet_v2(image_size: tuple[int, int], width: float) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018); its widths are multiples of 8."""
    from torchvision.models import mobilenet_v2

    return _without_last_layer(_for_small(mobilenet_v2(width_mult=width), image_size, 1))


@network("efficientnet_b0")
def efficientnet_b0(image_size: tuple[int, int]) -> nn.Module:
    """EfficientNet-B0 (Tan & Le 2019)."""
    from torchvision.models import efficientnet_b0

    return _without_last_layer(_for_small(efficientnet_b0(), image_size, 1))


@network("convnext_tiny")
def convnext_tiny(image_size: tuple[int, int]) -> nn.Module:
    """ConvNeXt-T (Liu et al. 2022)."""
    from torchvision.models import convnext_tiny

    return _without_last_layer(_for_small(convnext_tiny(), image_size, 2))


def _for_small(model: Any, image_size: tuple[int, int], stride: int) -> nn.Module:
    """Give the first convolution less of a stride where images are small; its weights stay."""
    if min(image_size) < _LEAST_SIDE:
        model.features[0][0].stride = (stride, stride)
    return model  # type: ignore[no-any-return]


def from_torchvision(name: str) -> MakeNetwork:
    """Return what builds one of torchvision's classifiers, exactly, without its last layer.

    Raises
    ------
    InputError
        If torchvision has none of the name, or its family was not tried.
    """
    from torchvision import models

    if name not in models.list_models(module=models) or not name.startswith(FAMILIES):
        raise InputError(
            f"network 'torchvision:{name}': no classifier of a family that was tried; allowed: "
            f"those of {', '.join(FAMILIES)}"
        )

    def make() -> nn.Module:
        model = models.get_model(name, weights=None, **_OPTIONS.get(name, {}))
        return model.features if name.startswith("squeezenet") else _without_last_layer(model)

    return make


NETWORKS.libraries["torchvision"] = from_torchvision


def _without_last_layer(model: nn.Module) -> nn.Module:
    *_, last = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    parent, _, name = last.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    return model
