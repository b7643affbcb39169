"""FullGrad's variants, simple and smooth: the formulas, and what the noise depends on."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explained import small_vgg, some_images
from permafrost.explain import simple_fullgrad, smooth_fullgrad


def naive_terms(model: nn.Sequential, image: Tensor, target: int):
    """The input's gradient, and gradients and biases of convolutions and BatchNorms."""
    x = image[None].clone().requires_grad_()
    value, layers = x, []
    for module in model.eval():
        value = F.relu(value) if isinstance(module, nn.ReLU) else module(value)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            value.retain_grad()
            layers.append((module, value))
    value[0, target].backward()
    terms = []
    for module, output in layers:
        bias = module.bias.detach()
        if isinstance(module, nn.BatchNorm2d):
            deviation = torch.sqrt(module.running_var + module.eps)
            bias = bias - module.weight.detach() * module.running_mean / deviation
        terms.append((output.grad[0], bias[:, None, None]))
    model.zero_grad()
    return x.grad[0], terms


def overlay(values: Tensor, size: torch.Size, reading: str) -> Tensor:
    """ψ of one image's values (C, h, w), channel by channel."""
    total, values = torch.zeros(size, dtype=torch.float64), values.abs()
    for channel in values:
        smallest, eps = (values.min(), 1e-6) if reading == "layer" else (channel.min(), 1e-7)
        top = (values if reading == "layer" else channel).max() - smallest
        total += F.interpolate(
            ((channel - smallest) / (top + eps))[None, None],
            size,
            mode="bilinear",
            align_corners=reading == "layer",
        )[0, 0]
    return total


@pytest.mark.parametrize("reading", ["layer", "channel"])
def test_simple_fullgrad_is_the_formula(reading):
    model, (images, targets) = small_vgg(), some_images()
    found = simple_fullgrad(model, images, targets, reading=reading)
    for index, image in enumerate(images):
        gradient, terms = naive_terms(model, image, int(targets[index]))
        expected = overlay(gradient * image, image.shape[1:], reading)
        for at_layer, _ in terms:
            expected += overlay(at_layer, image.shape[1:], reading)
        torch.testing.assert_close(found[index], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reading", ["layer", "channel"])
def test_smooth_fullgrad_is_the_formula(reading):
    model, (images, targets) = small_vgg(), some_images(2)
    found = smooth_fullgrad(model, images, targets, reading=reading, seed=7)
    noise = torch.randn(25, *images.shape[1:], generator=torch.Generator().manual_seed(7)).double()
    for index, image in enumerate(images):
        of_input, of_layers = torch.zeros(1, *image.shape[1:], dtype=torch.float64), None
        for pattern in noise:
            copy = image + 0.15 * (image.max() - image.min()) * pattern
            gradient, terms = naive_terms(model, copy, int(targets[index]))
            of_input += (gradient * copy).sum(0) / 25
            products = [at_layer * bias / 25 for at_layer, bias in terms]
            if of_layers is not None:
                products = [old + new for old, new in zip(of_layers, products, strict=True)]
            of_layers = products
        expected = sum(
            overlay(product, image.shape[1:], reading) for product in [of_input, *of_layers]
        )
        torch.testing.assert_close(found[index], expected, rtol=1e-8, atol=1e-8)


def test_smooth_fullgrad_depends_on_image_and_seed_alone():
    model, (images, targets) = small_vgg().float(), some_images()
    images = images.float()
    state = torch.get_rng_state()
    together = smooth_fullgrad(model, images, targets)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(smooth_fullgrad(model, images, targets), together)
    assert torch.equal(smooth_fullgrad(model, images.flip(0), targets.flip(0)).flip(0), together)
    for index in range(len(images)):
        alone = smooth_fullgrad(model, images[index : index + 1], targets[index : index + 1])
        assert torch.equal(alone[0], together[index])
    assert not torch.allclose(smooth_fullgrad(model, images, targets, seed=1), together)


def test_smooth_fullgrad_without_noise_is_nearly_fullgrad():
    """An image of one colour has no range, and its only copy is itself."""
    model, targets = small_vgg(), torch.tensor([3])
    image = torch.full((1, 3, 20, 24), 0.5, dtype=torch.float64)
    smooth = smooth_fullgrad(model, image, targets)
    gradient, terms = naive_terms(model, image[0], 3)
    expected = overlay((gradient * image[0]).sum(0, keepdim=True), image.shape[2:], "layer")
    for at_layer, bias in terms:
        expected += overlay(at_layer * bias, image.shape[2:], "layer")
    torch.testing.assert_close(smooth[0], expected, rtol=1e-9, atol=1e-9)
