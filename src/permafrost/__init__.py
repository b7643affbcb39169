"""Explainability-guided filter freezing against catastrophic forgetting."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Before the imports, which take a while: whoever has it after the parent's death is no parent.
PARENT = os.getppid()

# Before the code that it hashes is imported.
from permafrost import source as source  # noqa: E402

if TYPE_CHECKING:
    from permafrost.api import Learned, learn, read_runs
    from permafrost.data import load_image, tasks_from_dataset, tasks_from_tensors
    from permafrost.predictor import Predictor, load_network
    from permafrost.ranking.method import ExplainConfig
    from permafrost.strategies import Keep
    from permafrost.training import TrainingConfig

__all__ = [
    "ExplainConfig",
    "Keep",
    "Learned",
    "Predictor",
    "TrainingConfig",
    "learn",
    "load_image",
    "load_network",
    "read_runs",
    "tasks_from_dataset",
    "tasks_from_tensors",
]

_HOMES = {
    "ExplainConfig": "ranking.method",
    "Keep": "strategies",
    "Learned": "api",
    "Predictor": "predictor",
    "TrainingConfig": "training",
    "learn": "api",
    "load_image": "data",
    "load_network": "predictor",
    "read_runs": "api",
    "tasks_from_dataset": "data",
    "tasks_from_tensors": "data",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: PyTorch, which commands can do without, takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
