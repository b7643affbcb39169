"""Weights criteria: scores that need no more than the weights of a network."""

import numpy as np
import torch
from torch import Tensor

from permafrost.errors import InputError
from permafrost.ranking.criteria import weights_criterion
from permafrost.ranking.evidence import Evidence


@weights_criterion
def random(evidence: Evidence) -> dict[str, Tensor]:
    """Draw every filter's score uniformly from 0..1.

    The generator is seeded by the seed and the layer's position, so a layer's scores depend on no
    other layer.

    Parameters
    ----------
    evidence : Evidence
        Its weights and seed are used.

    Returns
    -------
    scores : dict[str, Tensor (F, 1)]
        float32, on the CPU whatever the device of the weights.

    Raises
    ------
    ValueError
        If the seed is negative.
    """
    return {
        layer: torch.rand(
            len(weight), 1, generator=_generator(evidence.seed, position), dtype=torch.float32
        )
        for position, (layer, weight) in enumerate(evidence.weights.items())
    }


@weights_criterion
def magnitude(evidence: Evidence) -> dict[str, Tensor]:
    """Score every filter by the mean absolute value of its weights (Li et al. 2017).

    Parameters
    ----------
    evidence : Evidence
        Its weights are used.

    Returns
    -------
    scores : dict[str, Tensor (F, 1)]
        float32, 0 or more.

    References
    ----------
    Li, Kadav, Durdanovic, Samet & Graf, "Pruning filters for efficient ConvNets", ICLR 2017; its
    sum over the weights orders the filters of a layer as their mean does.
    """
    return {
        layer: weight.detach().float().flatten(1).abs().mean(dim=1, keepdim=True)
        for layer, weight in evidence.weights.items()
    }


@weights_criterion
def bn_gamma(evidence: Evidence) -> dict[str, Tensor]:
    """Score every filter by abs(γ) of the BatchNorm behind it (Liu et al. 2017).

    Parameters
    ----------
    evidence : Evidence
        Its weights (for the layers' names) and gammas are used.

    Returns
    -------
    scores : dict[str, Tensor (F, 1)]
        float32, 0 or more.

    Raises
    ------
    InputError
        If a layer has no BatchNorm, or one without γ.

    References
    ----------
    Liu, Li, Shen, Huang, Yan & Zhang, "Learning efficient convolutional networks through network
    slimming", ICCV 2017. They train with a penalty on γ, which is left out here.
    """
    for layer in evidence.weights:
        if layer not in evidence.gammas:
            raise InputError(
                f"criterion 'bn_gamma' needs a BatchNorm directly behind every convolution, "
                f"but layer {layer} has none that data flow shows: choose another criterion or a "
                "network with BatchNorm"
            )
    return {layer: evidence.gammas[layer].float().abs()[:, None] for layer in evidence.weights}


def _generator(seed: int, position: int) -> torch.Generator:
    """Return a generator of its own for the layer at this position."""
    # torch's CPU generator keeps 32 bits of its seed, so the pair is hashed to 32 bits, not summed.
    state = np.random.SeedSequence([seed, position]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
