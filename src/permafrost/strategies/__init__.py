"""Floor 3, strategies: how the second and later tasks are learned, one file a strategy."""

from permafrost.strategies.base import MaskSource, Strategy
from permafrost.strategies.finetune import Finetune
from permafrost.strategies.freeze import Freeze
from permafrost.strategies.joint import Joint
from permafrost.strategies.learner import Learner, Progress
from permafrost.strategies.linear_probe import LinearProbe

STRATEGIES = {strategy.name: strategy for strategy in (Finetune, Freeze, LinearProbe, Joint)}

__all__ = [
    "STRATEGIES",
    "Finetune",
    "Freeze",
    "Joint",
    "Learner",
    "LinearProbe",
    "MaskSource",
    "Progress",
    "Strategy",
]
