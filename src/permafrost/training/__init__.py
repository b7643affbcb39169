"""Training: the one training loop, its optimizers and its state."""

from permafrost.training.loop import (
    Draw,
    TrainingConfig,
    TrainingDiverged,
    TrainingState,
    fit,
    part_of,
)
from permafrost.training.optimizers import OptimizerName, build_optimizer
from permafrost.training.precision import resolve_precision
from permafrost.training.steps import Batch, Objective, Observer, cross_entropy, recordable

__all__ = [
    "Batch",
    "Draw",
    "Objective",
    "Observer",
    "OptimizerName",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingState",
    "build_optimizer",
    "cross_entropy",
    "fit",
    "part_of",
    "recordable",
    "resolve_precision",
]
