"""Strategies: how the second and later tasks are learned, one file a strategy."""

from permafrost.strategies.afc import Afc
from permafrost.strategies.base import (
    STRATEGIES,
    Guard,
    Keep,
    Lesson,
    MaskSource,
    Memory,
    Phase,
    Strategy,
    strategy,
)
from permafrost.strategies.critical_layer import CriticalLayer
from permafrost.strategies.ewc import Ewc
from permafrost.strategies.finetune import Finetune
from permafrost.strategies.fragile_layer import FragileLayer
from permafrost.strategies.freeze import Freeze
from permafrost.strategies.freeze_with import FreezeEwc, FreezeLwf, FreezeWith
from permafrost.strategies.joint import Joint
from permafrost.strategies.learner import Learner, Progress
from permafrost.strategies.linear_probe import LinearProbe
from permafrost.strategies.lwf import Lwf
from permafrost.strategies.lwm import Lwm
from permafrost.strategies.packnet import RETRAIN, PackNet
from permafrost.strategies.path_integral import INTEGRAL, PathIntegral
from permafrost.strategies.quadratic import common_parameters
from permafrost.strategies.replay import Replay
from permafrost.strategies.rrr import Rrr
from permafrost.strategies.si import Si

__all__ = [
    "INTEGRAL",
    "RETRAIN",
    "STRATEGIES",
    "Afc",
    "CriticalLayer",
    "Ewc",
    "Finetune",
    "FragileLayer",
    "Freeze",
    "FreezeEwc",
    "FreezeLwf",
    "FreezeWith",
    "Guard",
    "Joint",
    "Keep",
    "Learner",
    "Lesson",
    "LinearProbe",
    "Lwf",
    "Lwm",
    "MaskSource",
    "Memory",
    "PackNet",
    "PathIntegral",
    "Phase",
    "Progress",
    "Replay",
    "Rrr",
    "Si",
    "Strategy",
    "common_parameters",
    "strategy",
]
