"""Scaling what is left of a layer to the norm that it had, where a norm behind it forgives that."""

from collections.abc import Mapping

import torch
from torch import Tensor

from permafrost.explain import conv_layers
from permafrost.models import TaskNetwork
from permafrost.models.units import trace_flow


def weight_norms(network: TaskNetwork) -> dict[str, Tensor]:
    """Return the Frobenius norm of each convolution's weight."""
    return {name: conv.weight.detach().norm() for name, conv in conv_layers(network).items()}


@torch.no_grad()
def rescale(network: TaskNetwork, before: Mapping[str, Tensor]) -> None:
    """Scale convolutions that a norm follows to a norm that they had, and its statistics with them.

    Behind a norm that alone reads a convolution this changes no answer, but for its ε. A smaller
    weight there has a larger effective learning rate (van Laarhoven 2017), which would tell methods
    apart for a wrong reason.

    Parameters
    ----------
    network : TaskNetwork
        Some of its weights are 0 now.
    before : mapping of str to Tensor
        As :func:`weight_norms` gave them; layers that are left out stay as they are.
    """
    convs, norms = conv_layers(network), dict(network.named_modules())
    for name, behind in trace_flow(network).norms.items():
        now = convs[name].weight.norm()
        kept = all(getattr(norms[norm], "running_mean", None) is not None for norm in behind)
        if name not in before or not behind or not kept or now == 0:
            continue
        factor = before[name] / now
        convs[name].weight.mul_(factor)
        if (bias := convs[name].bias) is not None:
            bias.mul_(factor)
        for norm in behind:
            norms[norm].running_mean.mul_(factor)
            norms[norm].running_var.mul_(factor.square())
