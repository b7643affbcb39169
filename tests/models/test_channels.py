"""Which channels a convolution reads, and which layers share them."""

import pytest
import torch
from torch import nn
from torchvision.models import efficientnet_b0, mobilenet_v2, resnet18, resnet50
from torchvision.models.resnet import BasicBlock, ResNet

from permafrost.models.channels import read_by, trace_channels


def bodies():
    """Return networks without their heads."""
    for make in (resnet18, resnet50, mobilenet_v2):
        network = make(num_classes=2)
        for name in ("fc", "classifier"):
            if hasattr(network, name):
                setattr(network, name, nn.Identity())
        yield pytest.param(network, id=make.__name__)


@pytest.mark.parametrize("body", list(bodies()))
def test_what_one_channel_reaches_is_what_reads_it(body):
    """A group's channel, disturbed in all convolutions that give it, changes just its readers."""
    channels = trace_channels(body.eval())
    layers = dict(body.named_modules())
    assert set(channels.gives) == {n for n, m in layers.items() if isinstance(m, nn.Conv2d)}
    assert set(channels.gives.values()) == set(channels.widths)
    for name, group in channels.gives.items():
        assert layers[name].out_channels == channels.widths[group]
        read = channels.reads[name]
        assert layers[name].in_channels == (3 if read is None else channels.widths[read])
    images = torch.rand(1, 3, 32, 32)
    group = list(channels.widths)[1]
    inputs = {}
    handles = [
        layers[name].register_forward_pre_hook(
            lambda _m, given, name=name: inputs.__setitem__(name, given[0].detach().clone())
        )
        for name in channels.gives
    ]
    with torch.no_grad():
        for norm, its in channels.norms.items():  # so that nothing else is lost to a ReLU
            if its == group:
                layers[norm].weight[0] = layers[norm].bias[0] = 0
        body(images)
    for handle in handles:
        handle.remove()
    readers = [name for name, read in channels.reads.items() if read == group]
    assert readers
    for name in readers:
        assert (inputs[name][:, 0] == 0).all(), name


def test_a_residual_network_shares_its_sums():
    channels = trace_channels(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2).apply(_without_head))
    assert channels.gives["layer1.0.conv2"] == "conv1"
    assert channels.gives["layer2.0.downsample.0"] == channels.gives["layer2.0.conv2"]
    assert channels.reads["layer2.0.conv1"] == "conv1"
    assert channels.reads["conv1"] is None
    assert channels.norms["bn1"] == "conv1"
    assert channels.features == channels.gives["layer4.0.conv2"]


def _without_head(module):
    if hasattr(module, "fc"):
        module.fc = nn.Identity()


def test_prefix():
    channels = trace_channels(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), "features.")
    assert channels.gives == {"features.0": "features.0"}
    assert channels.features == "features.0"


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, images):
        return torch.cat([self.one(images), self.other(images)], 1)


class Twice(Joined):
    def forward(self, images):
        return self.one(images) + self.one(images)


class ByNumbers(Joined):
    def forward(self, images):
        return self.one(images) if images.sum() > 0 else self.other(images)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (Joined(), "not followed through cat"),
        (Twice(), "runs twice"),
        (ByNumbers(), "cannot be followed"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), "GroupNorm"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)), "BatchNorm2d"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)), "Linear"),
        (efficientnet_b0(num_classes=2), "not followed through"),
    ],
    ids=["cat", "twice", "by numbers", "group norm", "norm without weights", "linear", "gates"],
)
def test_other_networks_are_refused(body, why):
    with pytest.raises(ValueError, match=why):
        trace_channels(body)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_what_a_grouped_convolution_reads(groups):
    conv = nn.Conv2d(4, 8, 3, groups=groups)
    read = read_by(conv, torch.arange(4))
    assert read.shape == conv.weight.shape[:2]
    size = 4 // groups
    for filter_index in range(8):
        first = filter_index // (8 // groups) * size
        assert read[filter_index].tolist() == list(range(first, first + size))
