"""Small networks that are held, by frozen filters or by single weights in the same way."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from permafrost.freezing import frozen_filters, frozen_weights

FROZEN = torch.tensor([True, True, False, False, False, True])


def images(count=4, size=12, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def build(conv=nn.Conv2d, norm=nn.BatchNorm2d, **options):
    """Return two convolutions, a norm behind the first, of which no value is its initial one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 6, 3, **options), norm(6), nn.Tanh(), nn.Conv2d(6, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    with torch.no_grad():
        for value in [*model.parameters(), *model[1].buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5)
    return model


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1)


def train(model, inputs=None, steps=3, make_optimizer=SGD):
    inputs = images() if inputs is None else inputs
    model.train()
    optimizer = make_optimizer(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def filters(model, mode="full", masks=None):
    return frozen_filters(model, masks or {"0": FROZEN, "3": FROZEN}, mode)


def element_masks(model):
    masks = {name: torch.zeros_like(model.get_parameter(name)) for name in ("0.weight", "3.weight")}
    for mask in masks.values():
        mask[FROZEN] = 1
    return {name: mask.bool() for name, mask in masks.items()}


def weights(model):
    """Hold the same rows of the weights alone, and the norm as a whole."""
    return frozen_weights(model, element_masks(model), batch_norms=True)


HOLD = pytest.mark.parametrize("hold", [filters, weights])


def state(model):
    return copy.deepcopy(model.state_dict())


def check_frozen(before, after, *names):
    """Frozen rows have the same bits and live ones have moved."""
    for name in names:
        assert torch.equal(before[name][FROZEN], after[name][FROZEN]), name
        assert not torch.equal(before[name][~FROZEN], after[name][~FROZEN]), name


NORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
ALL = ("0.weight", "0.bias", "3.weight", "3.bias", *NORM)
