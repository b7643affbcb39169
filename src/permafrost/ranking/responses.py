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


@response_criterion(finish=torch.abs)
def taylor_signed(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """Return the mean of a * g over the positions; a class's score is abs of its images' mean.

    What a filter does to one image's loss and undoes to another's of the class cancels, where
    ``taylor`` adds it up.

    Parameters
    ----------
    feature_map, gradient : Tensor (N, F, H, W)
        a and g.

    Returns
    -------
    Tensor (N, F)
        float64, of any sign.

    References
    ----------
    As of ``taylor``.
    """
    return _effect(feature_map, gradient) / feature_map[0, 0].numel()


def _in_layer_means(means: Tensor) -> Tensor:
    """Divide scores (F, C) by the mean of the layer's filters; scores of 0 stay."""
    layer = means.mean(dim=0, keepdim=True)
    return means / torch.where(layer > 0, layer, 1)


@response_criterion(finish=_in_layer_means)
def gradient(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """Return the sum of g^2 over the positions; scores are divided by their layer's mean.

    How fast the loss grows when the filter's response moves, wherever it moves: the importance of
    Adaptive Feature Consolidation (Kang et al. 2022, equation 6), taken there at the outputs of
    blocks and over all classes together.

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
    Kang, Park & Han, "Class-incremental learning by knowledge distillation with adaptive feature
    consolidation", CVPR 2022.
    """
    del feature_map
    return gradient.double().square().sum((2, 3))


def _from_all_classes(means: Tensor) -> Tensor:
    """Return how far scores (F, C) are from the mean of the classes'."""
    return (means - means.mean(dim=1, keepdim=True)).abs()


@response_criterion(of="logit")
def attribution(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """Return abs(sum of a * h over the positions), the filter's attribution to the logit.

    In a network of ReLUs that is the filter's relevance by LRP-0 (Ancona et al. 2018).

    Parameters
    ----------
    feature_map, gradient : Tensor (N, F, H, W)
        a, and the gradient h of the true label's logit with respect to it.

    Returns
    -------
    Tensor (N, F)
        float64, 0 or more.

    References
    ----------
    Ancona, Ceolini, Öztireli & Gross, "Towards better understanding of gradient-based attribution
    methods for deep neural networks", ICLR 2018.
    """
    return _effect(feature_map, gradient).abs()


@response_criterion(of="logit", finish=_from_all_classes)
def contrast(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """Return the sum of a * h over the positions; a class's score is how far it is from the rest.

    The score is abs(class mean - mean of the class means): a filter that adds as much to every
    class's own logit tells none of them from the others.

    Parameters
    ----------
    feature_map, gradient : Tensor (N, F, H, W)
        a, and the gradient h of the true label's logit with respect to it.

    Returns
    -------
    Tensor (N, F)
        float64, of any sign.
    """
    return _effect(feature_map, gradient)


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
