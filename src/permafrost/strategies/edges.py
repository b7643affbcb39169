"""PackNet's procedure, its weights chosen by what the task's answers depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from permafrost.hyper import Allowed, Value
from permafrost.strategies.base import Lesson, strategy
from permafrost.strategies.packnet import OWNER, PackNet
from permafrost.strategies.rescaling import rescale, weight_norms
from permafrost.strategies.sized import CHANCE, SHARE_TWINS, Sized, weight_scores
from permafrost.training import part_of

BY = ("score", "magnitude")


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
    are. By magnitude with uniform shares it is PackNet with scaled weights.

    Attributes
    ----------
    share : float
        Of the weights that the task trained, 0..1: 1 less ``prune`` of PackNet. 0 for an equal part
        of all weights for each task.
    by : {"score", "magnitude"}
        ``score``: :func:`~permafrost.strategies.sized.weight_scores`, |w · g|.
    """

    by: str = "score"
    prune: float = field(default=0.0, init=False)  # not read

    hyper: ClassVar[dict[str, Allowed]] = {**Sized.hyper, "by": BY}
    # By depth the deepest layers' norms would be fixed while next to nothing passes them.
    twins: ClassVar[tuple[str, ...]] = (CHANCE, *(t for t in SHARE_TWINS if t != "depth"))

    @classmethod
    def controls(cls, hyper: Mapping[str, Value]) -> tuple[str, ...]:
        """Return the twins; chance only where weights are chosen by their score."""
        is_scored = hyper["by"] == "score"
        return tuple(twin for twin in super().controls(hyper) if is_scored or twin != CHANCE)

    def part(self, lesson: Lesson) -> float:
        """Return the part of all weights that a task keeps: as many as PackNet would leave it."""
        if not self.share:
            return super().part(lesson)
        packed = part_of(lesson.memory, OWNER)
        owners = [owner for name, owner in packed.items() if not name.startswith("heads.")]
        total = sum(owner.numel() for owner in owners)
        trained = sum(int((owner == lesson.learned).sum()) for owner in owners)
        return self.share * (trained / total if total else 1.0)

    def _clear(
        self, packed: Mapping[str, nn.Parameter], owners: Mapping[str, Tensor], lesson: Lesson
    ) -> None:
        before = weight_norms(lesson.network)
        super()._clear(packed, owners, lesson)
        if lesson.learned == 1:
            rescale(lesson.network, before)

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
