"""PackNet's procedure, its weights chosen by what the task's answers depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from permafrost.hyper import Allowed, Value
from permafrost.models import TaskNetwork
from permafrost.strategies.base import Lesson, Memory, Phase, strategy
from permafrost.strategies.packnet import OWNER, PackNet
from permafrost.strategies.rescaling import rescale, weight_norms
from permafrost.strategies.sized import CHANCE, SHARE_TWINS, Sized, weight_scores
from permafrost.training import part_of

BY = ("score", "magnitude")
STARTS = ("whole", "pruned")
# Norms and biases of each task.
OWN = "own/"


@strategy("edges")
@dataclass(frozen=True)
class Edges(Sized, PackNet):
    """Give each task the weights that its answers depend on, as many of each layer as these say.

    As :class:`~permafrost.strategies.packnet.PackNet`, but for which weights a task keeps: of each
    convolution the part that ``shares`` says, where that is none as many weights as it has filters,
    of a shared head the part ``share``, in both the best by ``by``. Before the first task's weights
    are retrained, those of each layer are scaled to the norm that the layer had, and the
    BatchNorm's statistics with them: behind a norm this changes no answer, while smaller weights
    would learn faster. Later tasks' weights stand beside others that are fixed, and stay as they
    are. By magnitude, with uniform shares and a pruned start, it is PackNet with scaled weights.

    Attributes
    ----------
    by : {"score", "magnitude"}
        ``score``: :func:`~permafrost.strategies.sized.weight_scores`, |w · g|.
    start : {"whole", "pruned"}
        What the next task begins with. ``whole``: the network as it was before it was pruned, but
        for the weights that tasks own, with norms and biases of the task's own from then on.
        ``pruned``: PackNet's way, the others at zero, and the first task's norms and biases.
    """

    by: str = "score"
    start: str = "whole"
    prune: float = field(default=0.0, init=False)  # not read

    hyper: ClassVar[dict[str, Allowed]] = {**Sized.hyper, "by": BY, "start": STARTS}
    # By depth the deepest layers' norms would be fixed while next to nothing passes them.
    twins: ClassVar[tuple[str, ...]] = (CHANCE, *(t for t in SHARE_TWINS if t != "depth"))

    @classmethod
    def controls(cls, hyper: Mapping[str, Value]) -> tuple[str, ...]:
        """Return the twins; chance only where weights are chosen by their score."""
        is_scored = hyper["by"] == "score"
        return tuple(twin for twin in super().controls(hyper) if is_scored or twin != CHANCE)

    def fixes_norms(self, lesson: Lesson, phase: Phase) -> bool:
        """Return whether BatchNorms and biases hold still: no, where each task has its own."""
        return self.start == "pruned" and super().fixes_norms(lesson, phase)

    def network_for(self, network: TaskNetwork, task: int, memory: Memory) -> TaskNetwork:
        """Return a copy with what is the task's own."""
        answering = super().network_for(network, task, memory)
        own = part_of(memory, f"{OWN}{task}/")
        if own:  # then it is a copy
            answering.load_state_dict(own, strict=False)
        return answering

    def _clear(
        self, packed: Mapping[str, nn.Parameter], owners: Mapping[str, Tensor], lesson: Lesson
    ) -> None:
        before = weight_norms(lesson.network)
        super()._clear(packed, owners, lesson)
        if lesson.learned == 1:
            rescale(lesson.network, before)

    def _after_retraining(self, lesson: Lesson, owners: Memory) -> Memory:
        """Keep the task's norms and biases, and give the next one the whole network."""
        if self.start == "pruned":
            return {}
        network, owners = lesson.network, part_of(owners, OWNER)
        start = {name: value.to(lesson.device) for name, value in lesson.start.items()}
        kept = {name: (owner != 0).to(lesson.device) for name, owner in owners.items()}
        if lesson.learned == 1:  # back from the scale at which the rest was missing
            rescale(
                network,
                {
                    name: norm
                    * (start[f"{name}.weight"] * kept[f"{name}.weight"]).norm()
                    / start[f"{name}.weight"].norm()
                    for name, norm in weight_norms(network).items()
                },
            )
        now = network.state_dict()
        heads = {name: value.clone() for name, value in now.items() if name.startswith("heads.")}
        whole = {name: torch.where(mask, now[name], start[name]) for name, mask in kept.items()}
        own = {name: value for name, value in now.items() if self._is_own(name, owners)}
        memory = {f"{OWN}{lesson.learned - 1}/{n}": v.cpu().clone() for n, v in own.items()}
        network.load_state_dict(start | heads | whole)
        return memory

    def _is_own(self, name: str, owners: Memory) -> bool:
        is_head = name.startswith("heads.")
        return name not in owners and (self.head == "shared" or not is_head)

    def _choice(
        self, packed: Mapping[str, nn.Parameter], owners: Mapping[str, Tensor], lesson: Lesson
    ) -> tuple[Mapping[str, Tensor], dict[str, int]]:
        free = {name.removesuffix(".weight"): o == lesson.learned for name, o in owners.items()}
        shares = self.layer_shares(lesson, free)
        kept = {}
        for name, owner in owners.items():
            share = shares.get(name.removesuffix(".weight"), self.part(lesson))
            # A layer without any weight would answer nothing: it gets as many as it has filters.
            wanted = round(share * owner.numel()) or len(owner)
            kept[name] = min(wanted, int((owner == lesson.learned).sum()))
        scores = {name: weight.detach().abs() for name, weight in packed.items()}
        if self.by == "score":
            found = weight_scores(lesson, CHANCE if self.twin == CHANCE else None)
            scores |= {f"{name}.weight": values for name, values in found.items()}
        return scores, kept
