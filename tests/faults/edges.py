"""Trainings of a moment and refusals in one line, for numbers at their edges."""

import re
from contextlib import contextmanager

import torch

from permafrost.data import LabeledImages, Normalization
from permafrost.explain import conv_layers
from permafrost.ranking import frozen_mask
from permafrost.training import TrainingConfig, fit

CPU = torch.device("cpu")
MILD = TrainingConfig(epochs=1, lr=0.01, batch_size=4)
FLAT = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def train(model, batches, config, **options):
    return fit(model, batches, config, generator=torch.Generator().manual_seed(0), **options)


def all_finite(module):
    return all(value.isfinite().all() for value in module.state_dict().values())


@contextmanager
def refused(error, pattern):
    """Within the block the error must be raised, in one line that matches the pattern."""
    try:
        yield
    except error as caught:
        line = str(caught)
    else:  # an AssertionError, which a trial counts; pytest.raises would end the test
        raise AssertionError("nothing was refused")
    assert "\n" not in line
    assert re.search(pattern, line), line


def masks_of(pct):
    def choose(lesson, frozen=None):
        network = getattr(lesson, "network", lesson)
        return {
            name: frozen_mask(torch.arange(layer.out_channels).flip(0), pct)
            for name, layer in conv_layers(network).items()
        }

    return choose


def noise(count, side):
    generator = torch.Generator().manual_seed(side)
    images = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return LabeledImages(images, torch.arange(count) % 2)
