"""Small networks that respond to a few images, as tests of criteria share them."""

import torch
from torch import nn
from torch.nn import functional as F

from permafrost.ranking import RESPONSES, Evidence, filter_responses

CLASSES = 3


def small_network(batch_norm=True, bias=True):
    """Three convolutions with in-place ReLUs, as the project's networks are built."""
    torch.manual_seed(3)
    layers = []
    for inputs, outputs in ((3, 4), (4, 6), (6, 5)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias))
        if batch_norm:
            norm = nn.BatchNorm2d(outputs)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
            layers.append(norm)
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, CLASSES, bias=bias)]
    return nn.Sequential(*layers, *head).double().eval()


def labelled_images(count=11):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, 9, 10, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % CLASSES


def in_batches(images, labels, size=4):
    return zip(images.split(size), labels.split(size), strict=True)


def class_maps(seed=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(CLASSES, 9, 10, generator=generator, dtype=torch.float64)


def respond(model, criteria=RESPONSES, size=4, data=None):
    images, labels = data or labelled_images()
    batches = in_batches(images, labels, size)
    return filter_responses(model, batches, CLASSES, criteria, class_maps())


def naive_maps(model, image):
    """Run one image through; return the feature maps by convolution, and the logits."""
    maps, x, layers = {}, image[None], list(model.named_children())
    for index, (name, layer) in enumerate(layers):
        x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
        if isinstance(layer, nn.Conv2d):
            conv = name
            followed = isinstance(layers[index + 1][1], nn.BatchNorm2d)
        if isinstance(layer, nn.BatchNorm2d) or (isinstance(layer, nn.Conv2d) and not followed):
            maps[conv] = x
    return maps, x


def kept_logits(model, images, labels):
    """Return the labels' logits less the bias of the last layer."""
    return (model(images) - model.head.bias).gather(1, labels[:, None])[:, 0].detach()


class Head(nn.Module):
    """One convolution and what is to be explained behind it."""

    def __init__(self, behind):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.behind, self.head = nn.Conv2d(3, 4, 3), behind, nn.Linear(4, CLASSES)
        self.double().eval()

    def forward(self, x):
        return self.head(self.behind(F.relu(self.conv(x))).mean((2, 3)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def hand_made_evidence():
    class_maps = torch.tensor([[[0.0, 1], [0, 0]], [[0, 0.5], [1, 0]], [[0, 0], [0.8, 0.1]]])
    return Evidence(
        weights={"conv": torch.ones(3, 1, 1, 1)},
        filter_maps={"conv": torch.eye(4)[:3].view(3, 2, 2)},
        class_maps=class_maps,
        seed=4,
        gammas={"conv": torch.ones(3)},
        class_scores={"taylor": {"conv": torch.tensor([[1.0, 2, 6], [9, 0, 0], [2, 2, 2]])}},
    )
