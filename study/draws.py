"""More filters drawn by chance: a control is the mean of several draws."""

from dataclasses import replace

from torch import Tensor

from permafrost.ranking import Evidence, weights_criterion
from permafrost.ranking.weights import random


@weights_criterion
def second(evidence: Evidence) -> dict[str, Tensor]:
    """Draw other scores than `random`."""
    return random(replace(evidence, seed=evidence.seed + 1_000))


@weights_criterion
def third(evidence: Evidence) -> dict[str, Tensor]:
    """Draw others again."""
    return random(replace(evidence, seed=evidence.seed + 2_000))
