"""FullGrad: completeness, the two published readings, and a model left as it was."""

import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18
from torchvision.models.vgg import make_layers

from explained import mixed, snapshot, vary_batch_norm
from permafrost.explain import (
    class_saliency,
    completeness_error,
    fullgrad,
    is_piecewise_linear,
)

# The package exports the function under the module's name.
fullgrad_module = importlib.import_module("permafrost.explain.fullgrad")

CLASSES = 5


@pytest.fixture(autouse=True)
def _one_thread():
    """Small networks: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_vgg(batch_norm: bool) -> nn.Sequential:
    """torchvision's layers, with its in-place ReLU, in one flat sequence."""
    torch.manual_seed(0)
    layers = make_layers([8, 8, "M", 16, "M", 16, "M"], batch_norm)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)]
    return vary_batch_norm(nn.Sequential(*layers, *head))


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return vary_batch_norm(resnet18(weights=None, num_classes=CLASSES))


MODELS = {
    "vgg": lambda: small_vgg(False),
    "vgg_bn": lambda: small_vgg(True),
    "resnet18": small_resnet,
}


def some_images(count: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 20, 24, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.arange(count) % CLASSES


class TwiceUsed(nn.Module):
    """A convolution run twice, a linear layer on channels-last maps, affine-free BatchNorms."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.mix = nn.Linear(3, 6)
        self.norm1d = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(F.relu(self.conv(images.relu_()))))
        mixed = self.mix(features.permute(0, 2, 3, 1)).relu_().mean((1, 2))
        return self.head(self.norm1d(mixed))


# Completeness


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_completeness(name, dtype, limit):
    model = MODELS[name]().to(dtype)
    errors = completeness_error(model, *some_images(dtype=dtype))
    assert errors.shape == (4,)
    assert errors.max() <= limit


def test_completeness_after_training():
    model = small_vgg(True).double()
    images, targets = some_images(8)
    before = fullgrad(model, images, targets)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images * 2 + 1), targets).backward()
        optimizer.step()
    assert completeness_error(model, images, targets).max() <= 1e-10
    assert not torch.allclose(before, fullgrad(model, images, targets))


def test_completeness_of_layers_run_twice_and_of_linear_layers_on_maps():
    torch.manual_seed(0)
    model = TwiceUsed().double()
    for norm in (model.norm, model.norm1d):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    assert completeness_error(model, *some_images()).max() <= 1e-10


def test_completeness_catches_a_wrong_batch_norm_bias(monkeypatch):
    model, (images, targets) = small_vgg(True).double(), some_images()

    def explicit_bias_only(_func, call):
        return call["bias"]

    monkeypatch.setattr(fullgrad_module, "_implicit_bias", explicit_bias_only)
    assert completeness_error(model, images, targets).min() > 1e-2


def test_completeness_is_relative_to_the_layers_inner_products():
    """One linear layer: f = w·x + b, so the scale is |w·x| + |b|; its output is broken by 1."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.linear(images.mean((2, 3))) + 1

    model, (images, targets) = Broken().double(), some_images()
    with torch.no_grad():
        product = F.linear(images.mean((2, 3)), model.linear.weight)[range(4), targets]
        expected = 1 / (product.abs() + model.linear.bias[targets].abs())
    torch.testing.assert_close(completeness_error(model, images, targets), expected)


def test_a_network_that_outputs_zero_is_complete():
    model = small_vgg(False)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert completeness_error(model, *some_images(dtype=torch.float32)).tolist() == [0] * 4


def test_smooth_networks_are_reported():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert not is_piecewise_linear(model)
    assert completeness_error(model, *some_images(dtype=torch.float32)).max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_relu_networks_are_piecewise_linear(name):
    assert is_piecewise_linear(MODELS[name]())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LeakyReLU(), True),
        (nn.AvgPool2d(2), True),
        (nn.Sequential(), True),
        (nn.Sequential(nn.Sequential(), nn.Dropout()), True),
        (nn.SiLU(), False),
        (nn.Hardswish(), False),
        (nn.GELU(), False),
        (nn.Sigmoid(), False),
        (nn.Tanh(), False),
        (nn.Softplus(), False),
        (nn.ELU(), False),
        (nn.ReLU6(), False),
        (nn.GroupNorm(1, 2), False),
    ],
)
def test_is_piecewise_linear(module, expected):
    assert is_piecewise_linear(nn.Sequential(nn.Conv2d(3, 3, 1), module)) is expected


# Maps


def naive_products(model: nn.Sequential, image: Tensor, target: int) -> list[Tensor]:
    """Gradient times input or bias, (C, h, w) each, from a retained out-of-place graph."""
    x = image.clone().unsqueeze(0).requires_grad_()
    value, outputs = x, []
    for module in model.eval():
        value = F.relu(value) if isinstance(module, nn.ReLU) else module(value)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            value.retain_grad()
            outputs.append((module, value))
    value[0, target].backward()
    products = [(x.grad * x.detach())[0]]
    for module, output in outputs:
        bias = module.bias.detach()
        if isinstance(module, nn.BatchNorm2d):
            deviation = torch.sqrt(module.running_var + module.eps)
            bias = bias - module.weight.detach() * module.running_mean / deviation
        products.append(output.grad[0] * bias[:, None, None])
    return products


def upsample(channel: Tensor, size: torch.Size, align_corners: bool) -> Tensor:
    return F.interpolate(
        channel[None, None], size, mode="bilinear", align_corners=align_corners
    ).squeeze()


def naive_layer_map(products: list[Tensor], size: torch.Size) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64)
    for product in products:
        shifted = product.abs() - product.abs().min()
        for channel in shifted / (shifted.max() + 1e-6):
            total += upsample(channel, size, True)
    return total


def naive_channel_map(products: list[Tensor], size: torch.Size) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64)
    for product in products:
        for channel in product.abs():
            shifted = channel - channel.min()
            total += upsample(shifted / (1e-7 + shifted.max()), size, False)
    return total


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(
    ("reading", "naive"), [("layer", naive_layer_map), ("channel", naive_channel_map)]
)
def test_maps_follow_the_formulas(batch_norm, reading, naive):
    model, (images, targets) = small_vgg(batch_norm).double(), some_images()
    maps = fullgrad(model, images, targets, reading=reading)
    assert maps.shape == (4, 20, 24)
    for image, target, found in zip(images, targets, maps, strict=True):
        expected = naive(naive_products(model, image, int(target)), image.shape[1:])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reading", ["layer", "channel"])
def test_small_differences_of_large_values_are_laid_over_the_image(reading):
    """In float32: 512 channels of about 1000, whose differences of 0.01 are what is rescaled."""
    generator = torch.Generator().manual_seed(0)
    values = 1000 + 0.01 * torch.rand(2, 512, 5, 6, generator=generator)
    size = torch.Size((5, 6))
    expected = fullgrad_module._overlay(values.double(), size, reading)
    found = fullgrad_module._overlay(values.clone(), size, reading)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("reading", ["layer", "channel"])
@pytest.mark.parametrize("name", MODELS)
def test_batched_equals_one_at_a_time(name, reading):
    model, (images, targets) = MODELS[name]().double().train(), some_images()
    together = fullgrad(model, images, targets, reading=reading)
    for i in range(len(images)):
        alone = fullgrad(model, images[i : i + 1], targets[i : i + 1], reading=reading)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_it_works_under_no_grad_and_records_nothing_for_the_caller():
    model, (images, targets) = small_vgg(True), some_images(dtype=torch.float32)
    recorded = fullgrad(model, images.requires_grad_(), targets)
    with torch.no_grad():
        assert torch.equal(fullgrad(model, images, targets), recorded)
    assert not recorded.requires_grad
    assert images.grad is None


# The model afterwards


def assert_same(before: dict, after: dict) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_model_and_the_images_are_unchanged():
    model, (images, targets) = mixed(small_vgg(True)), some_images(dtype=torch.float32)
    before, kept = snapshot(model), images.clone()
    fullgrad(model, images, targets)
    class_saliency(model, [(images, targets % 4)], 4)
    assert_same(before, snapshot(model))
    assert torch.equal(images, kept)
    assert not images.requires_grad


def test_a_network_that_begins_in_place_does_not_change_the_images():
    images, targets = some_images()
    kept = images.clone()
    fullgrad(TwiceUsed().double(), images, targets)
    assert torch.equal(images, kept)


def test_the_model_is_unchanged_after_an_exception():
    model, (images, targets) = mixed(small_vgg(True)), some_images(dtype=torch.float32)
    before = snapshot(model)
    with pytest.raises(ValueError, match="finite"):
        fullgrad(model, images * torch.nan, targets)
    assert_same(before, snapshot(model))
    with pytest.raises(RuntimeError):
        fullgrad(model, images[:, :2], targets)
    assert_same(before, snapshot(model))


class ConvolutionGradients(TorchDispatchMode):
    """Records which gradients (input, weight, bias) each convolution's backward pass computes."""

    def __init__(self):
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def test_no_weight_gradient_is_computed():
    model, (images, targets) = small_vgg(True), some_images(dtype=torch.float32)
    with ConvolutionGradients() as recorder:
        fullgrad(model, images, targets)
    assert recorder.masks == [[True, False, False]] * 4


# Refusals


@pytest.mark.parametrize(
    ("targets", "reading", "message"),
    [
        ([0, 1, 2, 5], "layer", "0..4"),
        ([0, 1, 2, -1], "layer", "0..4"),
        ([0, 1], "layer", "targets"),
        ([0, 1, 2, 3], "other", "reading"),
    ],
)
def test_refusals(targets, reading, message):
    images, _ = some_images(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        fullgrad(small_vgg(True), images, torch.tensor(targets), reading=reading)


def test_batch_norm_without_running_statistics_is_refused():
    layers = [nn.Conv2d(3, CLASSES, 1), nn.BatchNorm2d(CLASSES, track_running_stats=False)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="running statistics"):
        fullgrad(model, *some_images(dtype=torch.float32))


def test_a_model_without_logits_is_refused():
    with pytest.raises(ValueError, match="logits"):
        fullgrad(nn.Conv2d(3, 3, 1), *some_images(dtype=torch.float32))


# Classes


@pytest.mark.parametrize("reading", ["layer", "channel"])
def test_a_class_map_is_the_rescaled_mean_of_its_images_maps(reading):
    model, (images, _) = small_vgg(True).double(), some_images(9)
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0])
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    result = class_saliency(model, batches, 3, reading=reading)
    maps = fullgrad(model, images, labels, reading=reading)
    for label in range(3):
        mean = maps[labels == label].mean(0)
        expected = (mean - mean.min()) / (mean.max() - mean.min())
        torch.testing.assert_close(result.maps[label], expected, rtol=1e-9, atol=1e-9)
    assert result.maps.amin((1, 2)).tolist() == [0] * 3
    assert result.maps.amax((1, 2)).tolist() == [1] * 3


def test_class_saliency_reports_the_worst_completeness_error():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images, _ = some_images(6)
    labels = torch.arange(6) % 3
    batches = [(images[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    worst = completeness_error(model.double(), images, labels).max()
    with pytest.warns(UserWarning, match=r"'1' \(SiLU\)") as told:
        found = class_saliency(model, batches, 3).completeness
    assert found == pytest.approx(worst.item())
    assert len(told) == 1


def test_float32_class_maps_are_float32():
    images, labels = some_images(dtype=torch.float32)
    maps = class_saliency(small_vgg(True), iter([(images, labels)]), 4).maps
    assert maps.dtype == torch.float32


def test_constant_class_maps_are_zeros():
    model = small_vgg(False)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    images, labels = some_images(dtype=torch.float32)
    result = class_saliency(model, [(images, labels)], 4)
    assert not result.maps.any()


def test_a_class_without_images_is_refused():
    images, _ = some_images(dtype=torch.float32)
    labels = torch.tensor([0, 2, 0, 2])
    with pytest.raises(ValueError, match=r"without images: \[1\]"):
        class_saliency(small_vgg(True), [(images, labels)], 3)
    with pytest.raises(ValueError, match=r"without images: \[0, 1\]"):
        class_saliency(small_vgg(True), [], 2)
    with pytest.raises(ValueError, match="labels"):
        class_saliency(small_vgg(True), [(images, labels)], 2)
