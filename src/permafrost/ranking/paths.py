"""What saliency methods that have terms of their own in each layer say of its filters."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from permafrost.explain._scopes import explaining
from permafrost.ranking.class_scores import class_means, watch
from permafrost.ranking.criteria import network_criterion
from permafrost.ranking.features import feature_layers

_STEPS = 20

ImageBatches = Iterable[tuple[Tensor, Tensor]]


@network_criterion(passes=_STEPS + 1)
def conductance(
    model: nn.Module, images_by_batches: ImageBatches, classes: int
) -> dict[str, Tensor]:
    """Average the size of each filter's conductance over the images of every class.

    A filter's conductance is what integrated gradients owe to it: along the straight path from a
    baseline of zeros (the data's mean colour) to the image, the sum over its positions of
    ∫ df/da · da, f the true label's logit and a the filter's feature map (Dhamdhere et al. 2019,
    equation 2). The conductances of a layer through which all of the network runs sum to
    f(image) − f(baseline). The integral is a trapezoidal sum of 20 steps, each a pass.

    Parameters
    ----------
    model, images_by_batches, classes
        As for :func:`permafrost.ranking.filter_responses`.

    Returns
    -------
    scores : dict[str, Tensor (F, C)]
        By layer, 0 or more.

    References
    ----------
    Dhamdhere, Sundararajan & Yan, "How important is a neuron?", ICLR 2019.
    """
    layers: dict[str, str] = {}

    def measure(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        layers.update(layers or feature_layers(model, images[:1]))
        return {
            name: values.abs()
            for name, values in filter_conductance(model, layers, images, labels).items()
        }

    return class_means(measure, images_by_batches, classes)


def filter_conductance(
    model: nn.Module,
    layers: dict[str, str],
    images: Tensor,
    labels: Tensor,
    steps: int = _STEPS,
) -> dict[str, Tensor]:
    """Return each filter's conductance for each image, signed.

    Parameters
    ----------
    model : nn.Module
        Run in eval mode.
    layers : dict of str to str
        As :func:`permafrost.ranking.features.feature_layers` gives them.
    images, labels
        (N, 3, H, W) and (N,).
    steps : int
        Of the integral.

    Returns
    -------
    dict[str, Tensor (N, F)]
        By layer, float64.
    """
    before: dict[str, tuple[Tensor, Tensor]] = {}
    sums: dict[str, Tensor] = {}

    def add(layer: str, feature_map: Tensor, gradient: Tensor) -> None:
        if layer in before:
            old_map, old_gradient = before[layer]
            moved = (feature_map - old_map) * (gradient + old_gradient) / 2
            sums[layer] = sums.get(layer, 0) + moved.sum((2, 3), dtype=torch.float64)
        before[layer] = feature_map, gradient

    for step in range(steps + 1):
        watch(model, layers, "logit", images * (step / steps), labels, add)
    return {layer: sums[layer] for layer in layers}


@network_criterion
def fullgrad_terms(
    model: nn.Module, images_by_batches: ImageBatches, classes: int
) -> dict[str, Tensor]:
    """Average each filter's own terms of FullGrad over the images of every class.

    The sum over the positions of abs(bias · df/d output), f the true label's logit, for the
    convolution's bias and for the implicit one of the norm behind it
    (:func:`permafrost.explain.fullgrad`): what the filter adds to the map, before it is rescaled.

    Parameters
    ----------
    model, images_by_batches, classes
        As for :func:`permafrost.ranking.filter_responses`.

    Returns
    -------
    scores : dict[str, Tensor (F, C)]
        By layer, 0 or more; 0 for filters without a bias.
    """
    layers: dict[str, str] = {}

    def measure(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not layers:
            features = feature_layers(model, images[:1])
            layers.update({module: conv for conv, module in features.items()})
            layers.update({conv: conv for conv in features})
        sums: dict[str, Tensor] = {}

        def add(module: str, output: Tensor, gradient: Tensor) -> None:
            bias = _constant(model, model.get_submodule(module), output)
            term = (gradient * bias).abs().sum((2, 3), dtype=torch.float64)
            sums[layers[module]] = sums.get(layers[module], 0) + term

        watch(model, {module: module for module in layers}, "logit", images, labels, add)
        return {layer: sums[layer] for layer in dict.fromkeys(layers.values())}

    return class_means(measure, images_by_batches, classes)


@torch.no_grad()
def _constant(model: nn.Module, module: nn.Module, output: Tensor) -> Tensor:
    """Return what a convolution or norm adds whatever its input is, (1, F, 1, 1)."""
    channels = module.in_channels if isinstance(module, nn.Conv2d) else output.shape[1]
    kernel = module.kernel_size if isinstance(module, nn.Conv2d) else (1, 1)
    dilation = module.dilation if isinstance(module, nn.Conv2d) else (1, 1)
    size = [1 + (k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    with explaining(model):
        # Without hooks, which would take it for a pass over images.
        made: Tensor = module.forward(output.new_zeros(1, channels, *size))
    return made[:, :, :1, :1]
