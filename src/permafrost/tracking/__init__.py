"""MLflow: the only place that imports it.

What happened is known from files (runs and variants); MLflow mirrors them. A training logs live
while it runs, and :meth:`Tracker.reconcile` makes the store equal to the files at any time, so that
a store that was down, a stage that DVC restored and a training that was killed lose nothing.
"""

from permafrost.tracking.redaction import redact
from permafrost.tracking.tracker import (
    CURVES,
    EXPERIMENTS,
    FIRST_TASKS,
    RUNS,
    TRIALS,
    VARIANTS,
    LiveRun,
    RunRecord,
    Tracker,
    TrackingError,
    machine_tags,
)

__all__ = [
    "CURVES",
    "EXPERIMENTS",
    "FIRST_TASKS",
    "RUNS",
    "TRIALS",
    "VARIANTS",
    "LiveRun",
    "RunRecord",
    "Tracker",
    "TrackingError",
    "machine_tags",
    "redact",
]
