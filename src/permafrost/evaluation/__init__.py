"""Evaluation: the accuracy matrix, the measures made of it, and response drift."""

from permafrost.evaluation.accuracy import Accuracy, accuracy, accuracy_name, accuracy_row
from permafrost.evaluation.drift import mean_drift, response_drift
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
    "accuracy",
    "accuracy_name",
    "accuracy_row",
    "average_accuracy",
    "backward_transfer",
    "confidence_interval",
    "forgetting",
    "forward_transfer",
    "mean_drift",
    "response_drift",
    "share",
    "value_range",
]
