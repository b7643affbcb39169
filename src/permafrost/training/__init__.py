"""Training: the one training loop, its optimizers and its state."""

from permafrost.training.loop import (
    Batch,
    Objective,
    Observer,
    TrainingConfig,
    TrainingDiverged,
    TrainingState,
    cross_entropy,
    fit,
    part_of,
)
from permafrost.training.optimizers import OptimizerName, build_optimizer
from permafrost.training.precision import resolve_precision

__all__ = [
    "Batch",
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
    "resolve_precision",
]
