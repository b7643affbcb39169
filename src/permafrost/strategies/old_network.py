"""The network as it was when the next task began, for methods that ask it during training."""

from typing import cast

from torch import Tensor

from permafrost.freezing import plain_copy
from permafrost.models import TaskNetwork
from permafrost.strategies.base import Lesson, Memory
from permafrost.strategies.lwf import teacher_memory

OLD = "old/"


def old_network_memory(lesson: Lesson) -> Memory:
    """Keep the weights, beside what LwF keeps: its answers to the next task's images."""
    weights = {f"{OLD}{name}": value.clone() for name, value in lesson.network.state_dict().items()}
    return teacher_memory(lesson) | weights


def old_network(lesson: Lesson) -> TaskNetwork:
    """Return the network that has learned the tasks before, in eval mode; no weight of it moves."""
    old = cast(TaskNetwork, plain_copy(lesson.network))
    kept = lesson.memory.items()
    old.load_state_dict({n.removeprefix(OLD): v for n, v in kept if n.startswith(OLD)})
    return old.eval().requires_grad_(False)


def black_image(lesson: Lesson) -> Tensor:
    """Return an image of the tasks' size, (1, 3, H, W), on which layers can be found."""
    like = next(lesson.network.parameters())
    return like.new_zeros(1, 3, *lesson.sequence.image_size)


def safe_norm(squares: Tensor) -> Tensor:
    """Return the root of sums of squares, 1 in the place of 0: what is divided by it stays 0."""
    return squares.where(squares > 0, 1).sqrt()
