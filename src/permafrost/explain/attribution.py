"""Attribution methods of Captum: one map for each image, of the target's logit.

A method that attributes to the three colours of a position gives Σ_channels |attribution|: colours
of opposite signs would cancel in a plain sum, and FullGrad too takes absolute values before it
sums. The maps then say how much a position counts, not for or against which class.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.explain._checks import check_images, check_logits, check_maps, check_targets
from permafrost.explain._scopes import explaining
from permafrost.explain.methods import saliency_method
from permafrost.models.units import recording_flow

# Captum takes seconds to import, so each function imports what it uses.

_STEPS = 50


@saliency_method
def input_x_gradient(model: nn.Module, images: Tensor, targets: Tensor | Sequence[int]) -> Tensor:
    """Attribute a logit to the input by input times gradient.

    The attribution is x ⊙ ∇ₓf (Shrikumar, Greenside, Shcherbina and Kundaje, "Not just a black
    box", 2016), the input's term of FullGrad.

    Parameters
    ----------
    model
        Network of images (N, 3, H, W) to logits (N, C). It is run in eval mode; afterwards its
        training flags, gradients and hooks are as they were.
    images
        (N, 3, H, W), normalised, on the model's device and of its type. Not changed.
    targets
        (N,), int64, or a sequence of int: the logit to explain for each image.

    Returns
    -------
    Tensor
        (N, H, W), 0 or more, not rescaled, of the images' type and device: the sum over the
        colours of absolute values.

    Raises
    ------
    ValueError
        If a shape or a target does not fit.
    NotFiniteError
        If a logit or a map is not finite.
    """
    from captum.attr import InputXGradient

    with _checked(model, images, targets) as network:
        x = images.detach().clone().requires_grad_()
        return _one_map(InputXGradient(network).attribute(x, network.targets))


@saliency_method
def integrated_gradients(
    model: nn.Module, images: Tensor, targets: Tensor | Sequence[int]
) -> Tensor:
    """Attribute a logit to the input by integrated gradients.

    The attribution is (x − x₀) ⊙ ∫₀¹ ∇ₓf(x₀ + α (x − x₀)) dα (Sundararajan, Taly and Yan,
    "Axiomatic attribution for deep networks", ICML 2017, equation 1), and adds up to
    f(x) − f(x₀). The baseline x₀ is zero: with images that are normalised, the data's mean
    colour. The integral is a Gauss-Legendre sum of 50 steps, each a pass over the whole batch.

    Parameters
    ----------
    model, images, targets
        As in `input_x_gradient`.

    Returns
    -------
    Tensor
        As `input_x_gradient`.

    Raises
    ------
    ValueError
        As `input_x_gradient`.
    """
    from captum.attr import IntegratedGradients

    with _checked(model, images, targets) as network:
        attributions = IntegratedGradients(network).attribute(
            images.detach(),
            baselines=0.0,
            target=network.targets,
            n_steps=_STEPS,
            internal_batch_size=len(images),
        )
    return _one_map(attributions)


@saliency_method
def guided_backprop(model: nn.Module, images: Tensor, targets: Tensor | Sequence[int]) -> Tensor:
    """Attribute a logit to the input by guided backpropagation.

    The gradient with respect to the input, where each ReLU passes back only what is positive, in
    its input and in the gradient (Springenberg, Dosovitskiy, Brox and Riedmiller, "Striving for
    simplicity: the all convolutional net", ICLR workshop 2015, figure 1).

    Only ``nn.ReLU`` modules are guided, whether in place, shared by several layers, or with an
    input that is used elsewhere too. A ReLU that is called as a function keeps its own gradient.

    Parameters
    ----------
    model, images, targets
        As in `input_x_gradient`.

    Returns
    -------
    Tensor
        As `input_x_gradient`.

    Raises
    ------
    ValueError
        As `input_x_gradient`.
    """
    from captum.attr import GuidedBackprop

    with (
        _checked(model, images, targets) as network,
        _own_inputs(model),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Setting backward hooks")
        x = images.detach().clone().requires_grad_()
        return _one_map(GuidedBackprop(network).attribute(x, network.targets))


@saliency_method
def gradcam(model: nn.Module, images: Tensor, targets: Tensor | Sequence[int]) -> Tensor:
    """Locate what speaks for a logit in the last convolution's output, by Grad-CAM.

    The map is ReLU(Σ_k α_k A^k), where A^k is channel k of the output of the last convolution,
    before BatchNorm and activation, and α_k the mean over positions of the logit's gradient with
    respect to it (Selvaraju et al., "Grad-CAM", ICCV 2017, equations 1 and 2), interpolated
    bilinearly to the size of the image, corners not aligned.

    Parameters
    ----------
    model
        As in `input_x_gradient`. Its last convolution is the one that runs last, in eval mode,
        whatever the order in which they are registered; one that runs often counts when it first
        runs.
    images, targets
        As in `input_x_gradient`.

    Returns
    -------
    Tensor
        (N, H, W), 0 or more, not rescaled, of the images' type and device: as coarse as the
        last convolution's output, and all zeros where nothing speaks for the logit.

    Raises
    ------
    ValueError
        If the model runs no convolution, or as `input_x_gradient`.
    """
    from captum.attr import LayerGradCam

    with _checked(model, images, targets) as network:
        with recording_flow(model) as flow, torch.no_grad():
            model(images[:1].clone())
        if not flow.runs:
            raise ValueError("Grad-CAM needs a model that runs a convolution")
        last = model.get_submodule([*flow.runs][-1])
        cam = LayerGradCam(network, last).attribute(
            images.detach(), network.targets, relu_attributions=True
        )
    size = images.shape[2:]
    maps = F.interpolate(cam.detach(), size, mode="bilinear", align_corners=False).squeeze(1)
    return check_maps(maps)


class _CheckedNetwork(nn.Module):
    """A network run on a copy of its images, since it may begin in place, with checked logits."""

    def __init__(self, model: nn.Module, targets: Tensor):
        super().__init__()
        self.model = model
        self.targets = targets

    def forward(self, images: Tensor) -> Tensor:
        return check_logits(self.model(images.clone()), self.targets)


@contextmanager
def _checked(
    model: nn.Module, images: Tensor, targets: Tensor | Sequence[int]
) -> Iterator[_CheckedNetwork]:
    """Check the images; within the block the network is in eval mode and records gradients."""
    targets = check_targets(images, targets)
    check_images(images, targets)
    with explaining(model):
        yield _CheckedNetwork(model, targets)


@contextmanager
def _own_inputs(model: nn.Module) -> Iterator[None]:
    """Within the block every ReLU gets a copy of its input.

    Captum clips the gradient of the tensor that enters a ReLU. Where that tensor also goes around
    the ReLU (a residual network with pre-activation), the other way's gradient would be clipped
    with it; the copy's gradient comes from the ReLU alone.
    """

    def copy(_relu: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].clone()

    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    handles = [relu.register_forward_pre_hook(copy) for relu in relus]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _one_map(attributions: Tensor) -> Tensor:
    """Reduce (N, 3, H, W) to (N, H, W)."""
    return check_maps(attributions.detach().abs().sum(1))
