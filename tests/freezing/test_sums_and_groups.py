"""What a frozen filter holds where channels are summed, grouped or normalised together."""

import pytest
import torch
from torch import nn

from permafrost.freezing import frozen_filters

IMAGES = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))
FIRST = torch.tensor([True] + [False] * 5)


class Residual(nn.Module):
    """One block: what it is given, and two convolutions of it."""

    def __init__(self, norm=None):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(6)

    def forward(self, x):
        return x + self.norm(self.second(self.first(x).relu()))


@torch.enable_grad()
def learn(model, masks, steps=3):
    """Take steps with all that moves a weight without a gradient."""
    with frozen_filters(model.train(), masks, images=IMAGES):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            model(IMAGES).square().mean().backward()
            optimizer.step()
    return model.eval()


def test_a_sum_moves_with_its_other_part():
    """The filter's own answer to the same input is held; what is added to it is not."""
    model = nn.Sequential(nn.Conv2d(6, 6, 1), Residual())
    inside = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        held = model[1].second(inside)[:, 0], model.eval()(IMAGES)[:, 0]
        learn(model, {"1.second": FIRST})
        assert torch.equal(model[1].second(inside)[:, 0], held[0])
        assert not torch.allclose(model(IMAGES)[:, 0], held[1])


@pytest.mark.parametrize("groups", [2, 6], ids=["grouped", "depthwise"])
def test_filters_in_groups_are_held_and_the_others_learn_as_ever(groups):
    """Training gives what restoring the frozen rows after each step gives."""

    def make():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(6, 6, 3, groups=groups), nn.BatchNorm2d(6))

    held = learn(make(), {"0": FIRST}, steps=2)
    plain = make().train()
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        plain(IMAGES).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for name, value in plain.named_parameters():
                value[0] = start[name][0]
    for name in ("0.weight", "0.bias"):
        assert torch.equal(held.state_dict()[name][0], start[name][0])
        torch.testing.assert_close(held.state_dict()[name][1:], plain.state_dict()[name][1:])
        assert not torch.equal(held.state_dict()[name][1:], start[name][1:])


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 6), nn.GroupNorm(3, 6)], ids=["layer", "group"])
def test_norms_by_the_images_own_statistics_stay_live(norm):
    """They mix channels, so that a frozen filter's answer behind one moves with its neighbours."""
    model = nn.Sequential(nn.Conv2d(6, 6, 3), norm)
    with torch.no_grad():
        held = [layer(IMAGES)[:, 0] for layer in (model[0], model.eval())]
        gamma = norm.weight.clone()
        learn(model, {"0": FIRST})
        assert torch.equal(model[0](IMAGES)[:, 0], held[0])
        assert not torch.allclose(model(IMAGES)[:, 0], held[1])
        assert not torch.equal(norm.weight[0], gamma[0])
