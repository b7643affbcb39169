"""Learning without Memorizing (Dhar, Singh, Peng, Wu & Chellappa, CVPR 2019)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from permafrost.explain.activations import (
    activations,
    attention,
    deepest_of_size,
)
from permafrost.explain.fullgrad import fullgrad_with_graph
from permafrost.hyper import Allowed, Value
from permafrost.models import TaskNetwork
from permafrost.models.scopes import evaluating, float32_as
from permafrost.ranking.features import feature_layers
from permafrost.ranking.weight_scores import permuted
from permafrost.strategies.base import Guard, Lesson, Memory, Phase, strategy
from permafrost.strategies.lwf import Lwf
from permafrost.strategies.old_heads import old_logits
from permafrost.strategies.old_network import (
    black_image,
    old_network,
    old_network_memory,
    safe_norm,
)
from permafrost.strategies.sized import CHANCE
from permafrost.training import Batch, recordable

# Positions in each direction that the maps have at least, if any layer does.
_LEAST = 7


@strategy("lwm")
@dataclass(frozen=True)
class Lwm(Lwf):
    """Keep where the old network looks, beside what it answers.

    Minimises LwF's loss + γ · mean over images of ‖Q/‖Q‖₂ − Q'/‖Q'‖₂‖₁ (equation 3), where Q and Q'
    are the new and the old network's Grad-CAM maps of the old class that the old network answers
    with, as vectors; a map of zeros stays zeros. The gradient flows through the map, through its
    channels' weights too. In the paper the maps are of the last convolution, here of the deepest
    one with at least 7 x 7 positions, behind its norm and ReLU: on small images the last one has
    too few. Maps are made in eval mode. The paper gives no γ.

    Its twin by chance gives every channel another one's weight in the maps, in both networks the
    same; maps without such weights have none. Without the maps, γ 0, it is LwF.

    FACIL's implementation makes its maps without a graph, so that γ moves no weight there, and
    divides each position by its own size.

    Attributes
    ----------
    attention : float
        γ.
    maps : {"gradcam", "input_x_gradient", "fullgrad"}
        What takes the place of Grad-CAM's maps: Σ over colours of |x ⊙ ∇ₓf|, or FullGrad's, both of
        the image's size. γ has another scale with each.
    """

    attention: float = 1.0
    maps: str = "gradcam"

    knowledge = old_network_memory
    hyper: ClassVar[dict[str, Allowed]] = {
        **Lwf.hyper,
        "attention": (0, 1e6),
        "maps": ("gradcam", "input_x_gradient", "fullgrad"),
    }
    twins: ClassVar[tuple[str, ...]] = (CHANCE,)
    explained_by: ClassVar[str | None] = "attention"
    step_cost: ClassVar[float] = 2.5

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Add the maps' distance to LwF's loss."""
        old = old_network(lesson)
        # As in the network that learns: FullGrad tells biases by what needs a gradient.
        old.requires_grad_(self.maps == "fullgrad")
        layer = attention_layer(lesson, old)
        order = channel_order(lesson, layer) if self.twin == CHANCE else None
        explain = partial(class_maps, lesson, Maps(self.maps, layer, order))
        with super().while_learning(lesson, phase) as plain:

            @recordable
            def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
                loss, logits, labels = plain.objective(model, batch)
                before, answered = explain(old, batch.images)
                now, _ = explain(lesson.network, batch.images, answered)
                apart = map_distance(now, before.detach())
                return loss + self.attention * apart, logits, labels

            yield replace(plain, objective=objective)

    @classmethod
    def controls(cls, hyper: Mapping[str, Value]) -> tuple[str, ...]:
        """Return no twin by chance where the maps weight no channels."""
        return super().controls(hyper) if hyper["maps"] == "gradcam" else ()

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Keep the network that has learned the task."""
        del phase, guard
        return lesson.memory if lesson.is_last else old_network_memory(lesson)


def attention_layer(lesson: Lesson, network: TaskNetwork) -> dict[str, str]:
    """Return the convolution whose maps are compared, and the module that gives its feature map."""
    images = black_image(lesson)
    view = network.view("shared", 0, 1)
    conv = deepest_of_size(view, images, _LEAST)
    return {conv: feature_layers(view, images)[conv]}


def channel_order(lesson: Lesson, layer: dict[str, str]) -> Tensor:
    """Return another order of a layer's channels, the same for all tasks."""
    (conv,) = layer
    weight = lesson.network.get_parameter(f"{conv}.weight")
    return permuted(torch.arange(len(weight)), lesson.seed, "attention").to(lesson.device)


@dataclass(frozen=True)
class Maps:
    """How maps are made that a loss can be made of.

    Attributes
    ----------
    method : {"gradcam", "input_x_gradient", "fullgrad"}
        As for :class:`Lwm`.
    layer : dict of str to str
        Whose maps Grad-CAM weights, as :func:`attention_layer` gives it.
    order : Tensor of int64, shape (K,), or None
        As for :func:`attention`.
    """

    method: str
    layer: dict[str, str]
    order: Tensor | None = None

    def of(self, view: nn.Module, answer: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return maps (N, h, w), with a graph, of the logit that each image's answer is."""
        with explained_pass(view, self.layer) as found:
            if self.method == "fullgrad":
                return fullgrad_with_graph(answer, images)
            if self.method == "input_x_gradient":
                x = images.detach().clone().requires_grad_()
                (gradient,) = torch.autograd.grad(answer(x.clone()).sum(), x, create_graph=True)
                return (gradient * x.detach()).abs().sum(1)
            chosen = answer(images)
            (activation,) = found.values()
            return attention(activation, chosen, self.order)


def class_maps(
    lesson: Lesson, maps: Maps, network: TaskNetwork, images: Tensor, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return maps (N, h, w) of an old class each, with a graph, and which class it is.

    Parameters
    ----------
    lesson : Lesson
        Says which classes are old.
    maps : Maps
        How they are made.
    network : TaskNetwork
        Run in eval mode.
    images : Tensor, shape (N, 3, H, W)
        To be explained.
    chosen : Tensor of int64, shape (N,), optional
        Which of the old classes, over all old heads; by default the one that is answered with.
    """
    view = cast(nn.Sequential, network.view("shared", 0, 1))
    answered = chosen

    def answer(images: Tensor) -> Tensor:
        nonlocal answered
        embedding = view[:-1](images)
        logits = torch.cat(old_logits(network, lesson.head, lesson.learned, embedding), dim=1)
        answered = logits.argmax(1) if answered is None else answered
        return picked(logits, answered)

    found = maps.of(view, answer, images)
    assert answered is not None
    return found, answered


@contextmanager
def explained_pass(view: nn.Module, layer: dict[str, str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, a network is run to be explained: in eval mode and true float32.

    Yields what :func:`activations` does. Maps that are compared are so made in one format, whatever
    training computes in.
    """
    with (
        torch.enable_grad(),
        evaluating(view),
        float32_as("ieee"),
        activations(view, layer) as found,
    ):
        yield found


def picked(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return one logit of each image, (N,); a gather's gradient would wait for a GPU."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    return logits.where(classes == chosen[:, None], 0).sum(1)


def map_distance(new: Tensor, old: Tensor) -> Tensor:
    """Return the mean over images of the L1 distance of maps (N, h, w), each of L2 norm 1 or 0."""
    return (_unit(new) - _unit(old)).abs().sum(1).mean()


def _unit(maps: Tensor) -> Tensor:
    flat = maps.flatten(1)
    return flat / safe_norm(flat.square().sum(1, keepdim=True))
