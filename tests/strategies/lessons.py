"""What tests of strategies share: settings, lessons, and learning from the second task on."""

import copy
import math
from dataclasses import fields, replace

import torch

from permafrost.data import normalize
from permafrost.strategies import Learner, Lesson, Progress, common_parameters
from permafrost.strategies.quadratic import remember
from permafrost.training import Batch, TrainingConfig

CPU = torch.device("cpu")
HEADS = ["shared", "multi", "expanding"]
SGD = TrainingConfig(epochs=2, lr=0.02, weight_decay=0.05, batch_size=4, padding=2, flip=True)
CONFIGS = {
    "sgd": SGD,
    "adam": replace(SGD, optimizer="adam", lr=0.01),
    "adamw": replace(SGD, optimizer="adamw", lr=0.01),
}


class LargestFirst:
    """Ranks filters by the size of their weights, as a criterion might."""

    def orders(self, lesson, *, by_chance=False):
        return {
            name: layer.weight.detach().flatten(1).norm(dim=1).argsort(descending=not by_chance)
            for name, layer in lesson.network.named_modules()
            if isinstance(layer, torch.nn.Conv2d)
        }


RANKING = LargestFirst()


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def make_lesson(network, sequence, learned, head="multi", config=SGD, **options):
    return Lesson(network, learned, sequence, config, head, 0, CPU, **options)


def learn(strategy, network, sequence, config=SGD, memory=None, on_epoch=None, **options):
    """Learn from the second task on, from the network's weights; return the progress."""
    course = Learner(sequence, config, head=strategy.head, seed=0, device=CPU, **options)
    progress = Progress(1, [None, course.measure(network, 1)], memory=memory or {})
    while progress.learned < len(sequence.tasks):
        course.learn_task(network, strategy, progress, on_epoch)
    return progress


def watched(strategy, note):
    """Return the strategy, telling ``note`` what is kept after each phase."""

    class Watched(type(strategy)):
        def after_phase(self, lesson, phase, guard):
            memory = super().after_phase(lesson, phase, guard)
            note(lesson, phase, memory)
            return memory

    return Watched(**{entry.name: getattr(strategy, entry.name) for entry in fields(strategy)})


def copied_state(network):
    return copy.deepcopy(network.state_dict())


def all_images(part, sequence):
    return normalize(part.images, sequence.normalization)


def one_batch(sequence, task, positions=None, epoch=1, step=1):
    train = sequence.tasks[task].train
    positions = torch.arange(len(train)) if positions is None else positions
    images = all_images(train, sequence)[positions]
    return Batch(images, train.labels[positions], positions, epoch, step)


def distance(left, right, names=None):
    """Return how far apart two states are."""
    names = names or [n for n, value in left.items() if value.is_floating_point()]
    return math.sqrt(sum((left[n] - right[n]).square().sum().item() for n in names))


# Whose heads the first two tasks have in common with the third.
COMMON = {"shared": [0], "multi": [], "expanding": [0, 1]}


def penalty_memory(network, precision=None, shift=0.0, seed=4):
    """Return precisions (drawn from 0.5..1.5 unless given) and centres at the weights + shift.

    Of what is kept of the first task whatever the head: its own is among it.
    """
    draw = random(seed)
    body = common_parameters(network, "shared", 1)
    return remember(
        {
            name: torch.rand(value.shape, generator=draw) + 0.5
            if precision is None
            else torch.full_like(value, precision)
            for name, value in body.items()
        },
        {
            name: value.detach() + shift * torch.randn(value.shape, generator=draw)
            for name, value in body.items()
        },
    )
