"""The optimizers that a training may use."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

OptimizerName = Literal["sgd", "adam", "adamw"]


def build_optimizer(
    name: OptimizerName,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Build an optimizer; ``momentum`` is read by SGD only.

    Parameters
    ----------
    name : {"sgd", "adam", "adamw"}
        Which one.
    parameters : iterable of nn.Parameter
        What it moves.
    lr, momentum, weight_decay : float
        Learning rate >= 0 (0 moves no weight), momentum in 0 .. 1 and weight decay >= 0. SGD
        without momentum diverges where lr times weight decay is above 2, whatever the data.

    Raises
    ------
    ValueError
        If ``name`` is unknown.
    """
    parameters = list(parameters)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    # On a GPU the count of steps stays there too, so that a step can be recorded.
    capturable = any(parameter.is_cuda for parameter in parameters)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, capturable=capturable)
    if name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=lr, weight_decay=weight_decay, capturable=capturable
        )
    raise ValueError(f"unknown optimizer {name!r}")
