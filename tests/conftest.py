"""What the tests share: one thread, and tasks and networks that train in a moment."""

import pytest
import torch

from permafrost.data import LabeledImages, Normalization, Task, TaskSequence
from permafrost.models import build_network


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks gain nothing from threads, and sums must not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_part(patterns, per_class, generator):
    count = len(patterns) * per_class
    labels = torch.arange(len(patterns)).repeat_interleave(per_class)
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=generator)
    images = (patterns[labels] + noise).clamp(0, 255).to(torch.uint8)
    return LabeledImages(images, labels)


@pytest.fixture
def make_sequence():
    """Return a builder of tasks: every class is a coarse random pattern under noise."""

    def build(tasks=2, classes=2, train=4, test=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        built = []
        for task in range(tasks):
            coarse = torch.rand(classes, 3, 4, 4, generator=generator)
            patterns = (coarse.repeat_interleave(8, 2).repeat_interleave(8, 3) * 195).long()
            built.append(
                Task(
                    tuple(f"class {task * classes + index}" for index in range(classes)),
                    make_part(patterns, train, generator),
                    make_part(patterns, 0, generator),
                    make_part(patterns, test, generator),
                )
            )
        return TaskSequence(tuple(built), Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))

    return build


@pytest.fixture
def make_network():
    """Return a builder of small networks of two classes per task."""

    def build(arch="vgg11", width=0.05, batch_norm=True, tasks=2, seed=0, classes=2):
        return build_network(
            arch,
            width=width,
            batch_norm=batch_norm,
            classes_per_task=classes,
            tasks=tasks,
            seed=seed,
        )

    return build


@pytest.fixture
def same_bits():
    """Return a check that two state dicts hold the same names and the same bits."""

    def check(left, right):
        return list(left) == list(right) and all(
            torch.equal(left[name], right[name]) for name in left
        )

    return check
