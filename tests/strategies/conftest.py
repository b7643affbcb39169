"""What tests of strategies share: networks whose numbers are all their own."""

import pytest
import torch
from torch import nn

from lessons import random


@pytest.fixture
def make_stirred(make_network):
    """Return a builder of networks that answer firmly and of which no number is 0 or 1."""

    def build(heads=1.0, **options):
        network, draw = make_network(**options), random(1)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0, heads, generator=draw)
                    module.bias.normal_(0, heads, generator=draw)
                if isinstance(module, nn.Conv2d):
                    module.bias.normal_(0, 0.05, generator=draw)
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5, generator=draw)
                    module.bias.normal_(0.1, 0.2, generator=draw)
                    module.running_mean.normal_(0, 0.2, generator=draw)
                    module.running_var.uniform_(0.5, 1.5, generator=draw)
        return network.eval()

    return build
