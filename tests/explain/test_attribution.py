"""Saliency by gradients: the formulas, by hand, and in-place networks."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from explained import CLASSES, SharedReLU, gradients, small_vgg, some_images, vary_batch_norm
from permafrost.explain import gradcam, guided_backprop, input_x_gradient, integrated_gradients


class PreActivation(SharedReLU):
    """A ReLU's input also goes around it."""

    def forward(self, images: Tensor) -> Tensor:
        around = self.first(images)
        return self.head(self.relu(around + self.second(self.relu(around))).mean((2, 3)))


class FunctionalReLU(SharedReLU):
    """A ReLU that is no module."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.first(images)).mean((2, 3)))


def logits_of(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    return model(images)[range(len(targets)), targets]


def test_input_x_gradient_sums_the_colours_absolute_values():
    model, (images, targets) = small_vgg(), some_images()
    expected = (images * gradients(model, images, targets)).abs().sum(1)
    torch.testing.assert_close(input_x_gradient(model, images, targets), expected)


def test_integrated_gradients_is_the_gauss_legendre_sum_from_the_mean_colour():
    model, (images, targets) = small_vgg(), some_images()
    nodes, weights = np.polynomial.legendre.leggauss(50)
    integral = torch.zeros_like(images)
    for node, weight in zip(nodes, weights, strict=True):
        integral += weight / 2 * gradients(model, (node + 1) / 2 * images, targets)
    expected = (images * integral).abs().sum(1)
    # Captum rounds the weights to float32.
    torch.testing.assert_close(
        integrated_gradients(model, images, targets), expected, rtol=1e-5, atol=1e-9
    )


def test_integrated_gradients_adds_up():
    """Where every attribution is positive, the maps' sums are the logits' differences."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Conv2d(4, 4, 3), nn.Softplus()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    model.double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.abs_()
    images, targets = some_images()
    images.abs_()
    expected = logits_of(model, images, targets) - logits_of(model, 0 * images, targets)
    sums = integrated_gradients(model, images, targets).sum((1, 2))
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)


def test_guided_backprop_by_hand():
    """On one pixel 1 × 1 convolutions are matrices, and each ReLU keeps two masks."""
    torch.manual_seed(1)
    first, second, head = (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, CLASSES))
    model = nn.Sequential(first, nn.ReLU(True), second, nn.ReLU(True), nn.Flatten(), head).double()
    for image in torch.randn(4, 3, dtype=torch.float64):
        with torch.no_grad():
            one, two = first.weight[:, :, 0, 0], second.weight[:, :, 0, 0]
            below = one @ image + first.bias
            above = two @ below.clamp(min=0) + second.bias
            signal = head.weight[2].clamp(min=0) * (above > 0)
            signal = (two.T @ signal).clamp(min=0) * (below > 0)
            expected = (one.T @ signal).abs().sum()
        found = guided_backprop(model, image.view(1, 3, 1, 1), torch.tensor([2]))
        torch.testing.assert_close(found, expected.view(1, 1, 1))


class Guided(torch.autograd.Function):
    """The ReLU of guided backpropagation, written out."""

    @staticmethod
    def forward(context, values):
        context.save_for_backward(values)
        return values.clamp(min=0)

    @staticmethod
    def backward(context, gradient):
        return gradient.clamp(min=0) * (context.saved_tensors[0] > 0)


class GuidedReLU(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return Guided.apply(values)


def guided(build) -> nn.Module:
    """The same network with guided ReLUs; one that is shared stays shared."""
    model = build(inplace=False)
    replaced: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, replaced.setdefault(child, GuidedReLU()))
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("build", [small_vgg, SharedReLU])
def test_guided_backprop_clips_at_every_relu(build, inplace):
    images, targets = some_images()
    expected = gradients(guided(build), images, targets).abs().sum(1)
    plain = gradients(build(inplace=False), images, targets).abs().sum(1)
    found = guided_backprop(build(inplace=inplace), images, targets)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain)


def test_guided_backprop_clips_nothing_beside_a_relu():
    images, targets = some_images()
    expected = gradients(guided(PreActivation), images, targets).abs().sum(1)
    found = guided_backprop(PreActivation(inplace=False), images, targets)
    torch.testing.assert_close(found, expected)


def test_guided_backprop_does_not_see_functions():
    images, targets = some_images()
    model = FunctionalReLU()
    expected = gradients(model, images, targets).abs().sum(1)
    torch.testing.assert_close(guided_backprop(model, images, targets), expected)


def test_guided_backprop_of_a_resnet():
    torch.manual_seed(0)
    images, targets = some_images(2)

    def build(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return vary_batch_norm(resnet18(weights=None, num_classes=CLASSES)).double()

    expected = gradients(guided(build), images, targets).abs().sum(1)
    torch.testing.assert_close(guided_backprop(build(True), images, targets), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradcam_is_the_formula(inplace):
    model, (images, targets) = small_vgg(inplace), some_images()
    found = gradcam(model, images, targets)
    last = max(index for index, layer in enumerate(model) if isinstance(layer, nn.Conv2d))
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        activations = model.eval()[: last + 1](image[None]).detach().requires_grad_()
        # A copy: the next layer may be in place.
        model[last + 1 :](activations.clone())[0, target].backward()
        cam = torch.zeros(activations.shape[2:], dtype=torch.float64)
        for gradient, activation in zip(activations.grad[0], activations[0], strict=True):
            cam += gradient.mean() * activation.detach()
        expected = F.interpolate(
            cam.clamp(min=0)[None, None], images.shape[2:], mode="bilinear", align_corners=False
        )
        torch.testing.assert_close(found[index], expected[0, 0])
    assert found.max() > 0


def test_gradcam_is_zero_where_nothing_speaks_for_the_logit():
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(model[0].weight, -1)
    maps = gradcam(model, torch.ones(1, 3, 8, 8), torch.tensor([0]))
    assert maps.shape == (1, 8, 8)
    assert not maps.any()


def test_gradcam_needs_a_convolution():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES)).double()
    model(some_images()[0])
    with pytest.raises(ValueError, match="convolution"):
        gradcam(model, *some_images())
