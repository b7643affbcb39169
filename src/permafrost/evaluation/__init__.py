"""Evaluation: the accuracy matrix and the measures made of it.

:mod:`permafrost.evaluation.accuracy` and :mod:`permafrost.evaluation.drift` measure networks.
"""

from permafrost.evaluation.counts import Accuracy, accuracy_name
from permafrost.evaluation.formats import share
from permafrost.evaluation.measures import (
    Interval,
    average_accuracy,
    backward_transfer,
    confidence_interval,
    forgetting,
    forward_transfer,
    value_range,
)

__all__ = [
    "Accuracy",
    "Interval",
    "accuracy_name",
    "average_accuracy",
    "backward_transfer",
    "confidence_interval",
    "forgetting",
    "forward_transfer",
    "share",
    "value_range",
]
