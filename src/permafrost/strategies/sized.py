"""How much of each layer a task keeps: the same of all, or as an explanation has it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, cast

from torch import Tensor

from permafrost.explain import conv_layers
from permafrost.freezing import plain_copy
from permafrost.hyper import Allowed, Value
from permafrost.models import TaskNetwork
from permafrost.ranking.layer_shares import (
    SHARES,
    depth_shares,
    mixed_shares,
    threshold_shares,
    uniform_shares,
)
from permafrost.ranking.weight_scores import permuted, weight_gradients
from permafrost.strategies.base import Lesson, Strategy

# What stands in an explanation's place in controls.
CHANCE, EQUAL, UNTRAINED = "chance", "equal", "untrained"
SHARE_TWINS = ("uniform", "magnitude", "depth", UNTRAINED)


@dataclass(frozen=True)
class Sized(Strategy):
    """A method that keeps a part of the weights of the task learned last.

    Attributes
    ----------
    share : float
        Part of the convolutions' weights that each task keeps, 0..1; 0 for an equal part for each
        task. Which layers they are in, ``shares`` says.
    shares : {"uniform", "explained", "magnitude", "depth"}
        ``uniform``: the same part of what is free of every layer. ``explained``: as many of each as
        lie above one threshold on the score of a weight (:func:`weight_scores`). ``magnitude``: the
        same by the weight's size. ``depth``: whole layers from the input on.
    mix : float
        0..1: 0 for uniform shares, 1 for what ``shares`` says, between them in proportion.
    """

    share: float = 0.0
    shares: str = "explained"
    mix: float = 1.0

    hyper: ClassVar[dict[str, Allowed]] = {"share": (0, 1), "shares": SHARES, "mix": (0, 1)}
    twins: ClassVar[tuple[str, ...]] = SHARE_TWINS

    @classmethod
    def controls(cls, hyper: Mapping[str, Value]) -> tuple[str, ...]:
        """Return the twins; those of the shares where these are explained."""
        if hyper["shares"] == "explained" and hyper["mix"]:
            return cls.twins
        return tuple(twin for twin in cls.twins if twin not in SHARE_TWINS)

    def as_twin(self, twin: str) -> Self:
        """Return the control: with other shares, or with chance where the method ranks."""
        return replace(self, shares=twin) if twin in SHARES else replace(self, twin=twin)

    def part(self, lesson: Lesson) -> float:
        """Return the part of all weights that a task keeps."""
        return self.share or 1 / len(lesson.sequence.tasks)

    def layer_shares(
        self, lesson: Lesson, free: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """Return the share of each convolution's weights, of those that are free, that is kept."""
        weights = _weights(lesson.network)
        sizes = {name: weight.numel() for name, weight in weights.items()}
        part = self.part(lesson)
        uniform = uniform_shares(sizes, part, free)
        if self.shares == "uniform" or self.mix == 0:
            return uniform
        if self.shares == "depth":
            chosen = depth_shares(sizes, part, free)
        elif self.shares == "magnitude":
            sized = {name: weight.detach().abs() for name, weight in weights.items()}
            chosen = threshold_shares(sized, part, free)
        else:
            twin = UNTRAINED if self.twin == UNTRAINED else None
            chosen = threshold_shares(weight_scores(lesson, twin), part, free)
        return mixed_shares(uniform, chosen, self.mix)


def weight_scores(lesson: Lesson, twin: str | None = None) -> dict[str, Tensor]:
    """Return |w · g| of each weight of the convolutions, for the task learned last.

    g is as :func:`permafrost.ranking.weight_scores.weight_gradients` has it.

    Parameters
    ----------
    lesson : Lesson
        Of the next task.
    twin : {"chance", "untrained"}, optional
        ``chance``: |g| is permuted within its layer. ``untrained``: of the untrained network.
    """
    network, task = lesson.network, lesson.learned - 1
    if twin == UNTRAINED:
        network = cast(TaskNetwork, plain_copy(network))
        network.load_state_dict(lesson.untrained)
    # The task's own logits, which an expanding head has among others.
    own = "multi" if lesson.head == "expanding" else lesson.head
    view = network.view(own, task, lesson.learned)
    classes = len(lesson.sequence.tasks[task].classes)
    gradients = weight_gradients(view, lesson.batches(task), classes, lesson.seed)
    if twin == CHANCE:
        gradients = {
            name: permuted(sizes, lesson.seed, "weights", lesson.learned, name)
            for name, sizes in gradients.items()
        }
    weights = _weights(network)
    return {name: weights[name].detach().abs() * sizes for name, sizes in gradients.items()}


def _weights(network: TaskNetwork) -> dict[str, Tensor]:
    return {name: conv.weight for name, conv in conv_layers(network).items()}
