"""Response criteria: how each filter responds to an image, and what that does to the loss."""

import torch
from torch import Tensor

from permafrost.ranking.criteria import response_criterion


@response_criterion
def activation(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """Return the mean of abs(a) over the positions.

    Parameters
    ----------
    feature_map, gradient : Tensor (N, F, H, W)
        a, and the loss's gradient with respect to it.

    Returns
    -------
    Tensor (N, F)
        float64, 0 or more.
    """
    del gradient
    return feature_map.abs().mean((2, 3), dtype=torch.float64)


@response_criterion
def taylor(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """Return abs(mean of a * g over the positions).

    To first order the size of the loss's change when the filter is removed (Molchanov et al. 2017,
    equation 8: the absolute value is taken behind the mean over the positions and before that over
    the images).

    Parameters
    ----------
    feature_map, gradient : Tensor (N, F, H, W)
        a and g.

    Returns
    -------
    Tensor (N, F)
        float64, 0 or more.

    References
    ----------
    Molchanov, Tyree, Karras, Aila & Kautz, "Pruning convolutional neural networks for resource
    efficient inference", ICLR 2017.
    """
    return _effect(feature_map, gradient).abs() / feature_map[0, 0].numel()


@response_criterion
def fisher(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """Return (sum of a * g over the positions)^2 / 2.

    Its mean over images is the loss's change when the filter is removed, to second order (Theis et
    al. 2018, Fisher pruning of feature maps).

    Parameters
    ----------
    feature_map, gradient : Tensor (N, F, H, W)
        a and g.

    Returns
    -------
    Tensor (N, F)
        float64, 0 or more.

    References
    ----------
    Theis, Korshunova, Tejani & Huszár, "Faster gaze prediction with dense networks and Fisher
    pruning", arXiv:1801.05787, 2018.
    """
    return _effect(feature_map, gradient).square() / 2


def _effect(feature_map: Tensor, gradient: Tensor) -> Tensor:
    return (feature_map * gradient).sum((2, 3), dtype=torch.float64)
