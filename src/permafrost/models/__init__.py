"""Models: networks with a body and heads, by name."""

from permafrost.models.multihead import HEADS, Head, TaskNetwork
from permafrost.models.networks import NETWORKS, build_network, network
from permafrost.models.scopes import float32_as, measuring
from permafrost.models.weights import read_weights

__all__ = [
    "HEADS",
    "NETWORKS",
    "Head",
    "TaskNetwork",
    "build_network",
    "float32_as",
    "measuring",
    "network",
    "read_weights",
]
