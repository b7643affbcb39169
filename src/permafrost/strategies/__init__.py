"""Strategies: how the second and later tasks are learned, one file a strategy."""

from permafrost.strategies.afc import Afc, AfcRanked
from permafrost.strategies.base import (
    STRATEGIES,
    FilterRanking,
    Guard,
    Keep,
    Lesson,
    MaskSource,
    Memory,
    Phase,
    Strategy,
    strategy,
)
from permafrost.strategies.circuit import Circuit
from permafrost.strategies.composed import CircuitLwf, Composed, FreezeEwc, FreezeLwf, SoftLwf
from permafrost.strategies.critical_layer import CriticalLayer
from permafrost.strategies.edges import Edges
from permafrost.strategies.ewc import Ewc
from permafrost.strategies.finetune import Finetune
from permafrost.strategies.fragile_layer import FragileLayer
from permafrost.strategies.freeze import Freeze
from permafrost.strategies.joint import Joint
from permafrost.strategies.learner import Learner, Progress
from permafrost.strategies.linear_probe import LinearProbe
from permafrost.strategies.lwf import Lwf
from permafrost.strategies.lwm import Lwm
from permafrost.strategies.packnet import RETRAIN, PackNet
from permafrost.strategies.path_integral import INTEGRAL, PathIntegral
from permafrost.strategies.quadratic import common_parameters
from permafrost.strategies.replay import Replay
from permafrost.strategies.rnf import Rnf
from permafrost.strategies.rows import Rows
from permafrost.strategies.rrr import Rrr
from permafrost.strategies.si import Si
from permafrost.strategies.soft import Soft

__all__ = [
    "INTEGRAL",
    "RETRAIN",
    "STRATEGIES",
    "Afc",
    "AfcRanked",
    "Circuit",
    "CircuitLwf",
    "Composed",
    "CriticalLayer",
    "Edges",
    "Ewc",
    "FilterRanking",
    "Finetune",
    "FragileLayer",
    "Freeze",
    "FreezeEwc",
    "FreezeLwf",
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
    "Rnf",
    "Rows",
    "Rrr",
    "Si",
    "Soft",
    "SoftLwf",
    "Strategy",
    "common_parameters",
    "strategy",
]
