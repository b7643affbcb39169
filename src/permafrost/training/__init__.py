"""Floor 2, training: the one training loop, its optimizers and its state."""

from permafrost.training.loop import Answer, TrainingConfig, TrainingDiverged, TrainingState, fit
from permafrost.training.optimizers import OptimizerName, build_optimizer

__all__ = [
    "Answer",
    "OptimizerName",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingState",
    "build_optimizer",
    "fit",
]
