"""Saliency by every method: the formulas, in-place networks, and a model left as it was."""

import subprocess
import sys
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from permafrost.artifacts import load_tensors, save_tasks
from permafrost.errors import InputError
from permafrost.explain import (
    SALIENCY_METHODS,
    class_saliency,
    fullgrad,
    gradcam,
    guided_backprop,
    input_x_gradient,
    integrated_gradients,
    saliency_maps,
    simple_fullgrad,
    smooth_fullgrad,
)
from permafrost.params import Params
from permafrost.ranking import method as ranking_method
from permafrost.stages import saliency as stage

CLASSES = 5
DECOMPOSED = ("fullgrad", "smooth_fullgrad")


def vary(model: nn.Module) -> nn.Module:
    """Give BatchNorms statistics and parameters far from their initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.double()


def small_vgg(inplace: bool = True) -> nn.Sequential:
    """The project's order of layers: the last convolution is followed by BatchNorm and ReLU."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 6), (6, 8), (8, 8)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        norm = nn.BatchNorm2d(outputs)
        layers += [convolution, norm, nn.ReLU(inplace=inplace), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    return vary(nn.Sequential(*layers, *head))


class SharedReLU(nn.Module):
    """One ReLU for every layer of a residual block, as torchvision's ResNet has it."""

    def __init__(self, inplace: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=inplace), nn.Linear(4, CLASSES)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        around = self.relu(self.first(images))
        return self.head(self.relu(self.second(around) + around).mean((2, 3)))


class PreActivation(SharedReLU):
    """A ReLU's input also goes around it."""

    def forward(self, images: Tensor) -> Tensor:
        around = self.first(images)
        return self.head(self.relu(around + self.second(self.relu(around))).mean((2, 3)))


class FunctionalReLU(SharedReLU):
    """A ReLU that is no module."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.first(images)).mean((2, 3)))


def some_images(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 20, 24, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % CLASSES


def logits_of(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    return model(images)[range(len(targets)), targets]


def gradients(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Gradients of the targets' logits by the images, one image at a time."""
    found = []
    for image, target in zip(images, targets, strict=True):
        x = image[None].clone().requires_grad_()
        model.eval()(x.clone())[0, target].backward()
        found.append(x.grad[0])
    model.zero_grad()
    return torch.stack(found)


def snapshot(model: nn.Module) -> dict:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": [module.training for module in model.modules()],
        "inplace": [getattr(module, "inplace", None) for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "attributes": [dict.fromkeys(vars(module), 0) for module in model.modules()],
        "hooks": [
            sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks"))
            for module in model.modules()
        ],
        "tensor_hooks": [len(p._backward_hooks or ()) for p in model.parameters()],
    }


def assert_same(before: dict, after: dict) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0)


# Formulas


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
        return vary(resnet18(weights=None, num_classes=CLASSES))

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


# FullGrad's variants


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


# Every method


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_maps_are_not_negative_and_record_nothing(method):
    model, (images, targets) = small_vgg(), some_images()
    recorded = saliency_maps(model, images.clone().requires_grad_(), targets, method)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = saliency_maps(model, images, targets, method)
    assert torch.equal(maps, recorded)
    assert maps.shape == (4, 20, 24)
    assert maps.dtype == torch.float64
    assert maps.min() >= 0
    assert maps.max() > 0
    assert not recorded.requires_grad


@pytest.mark.parametrize("method", SALIENCY_METHODS)
@pytest.mark.parametrize("build", [small_vgg, SharedReLU])
def test_in_place_equals_out_of_place(build, method):
    images, targets = some_images()
    inside = saliency_maps(build(inplace=True), images, targets, method)
    torch.testing.assert_close(
        inside, saliency_maps(build(inplace=False), images, targets, method), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("method", SALIENCY_METHODS)
@pytest.mark.parametrize("build", [small_vgg, SharedReLU])
def test_a_batch_equals_one_at_a_time(build, method):
    model, (images, targets) = build().train(), some_images()
    together = saliency_maps(model, images, targets, method)
    for index in range(len(images)):
        part = slice(index, index + 1)
        alone = saliency_maps(model, images[part], targets[part], method)
        torch.testing.assert_close(together[part], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_every_target_has_its_own_map(method):
    model, (images, _) = small_vgg(), some_images(1)
    maps = [saliency_maps(model, images, torch.tensor([k]), method) for k in range(CLASSES)]
    assert all(not torch.allclose(maps[0], other) for other in maps[1:])


def mixed_vgg() -> nn.Sequential:
    """A model whose training flags, requires_grad and gradients are a mixture."""
    model = small_vgg().train()
    for index, module in enumerate(model):
        module.training = index % 3 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad = index % 2 == 0
        parameter.grad = torch.full_like(parameter, index) if index % 4 == 0 else None
    return model


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_the_model_and_the_images_are_unchanged(method):
    model, (images, targets) = mixed_vgg(), some_images()
    before, kept = snapshot(model), images.clone()
    saliency_maps(model, images, targets, method)
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match="finite"):
        saliency_maps(model, images * torch.nan, targets, method)
    with pytest.raises(RuntimeError):
        saliency_maps(model, images[:, :2], targets, method)
    assert_same(before, snapshot(model))
    assert torch.equal(images, kept)
    assert not images.requires_grad


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_a_network_that_begins_in_place_does_not_change_the_images(method):
    model, (images, targets) = nn.Sequential(nn.ReLU(inplace=True), *small_vgg()), some_images()
    kept = images.clone()
    maps = saliency_maps(model, images, targets, method)
    assert torch.equal(images, kept)
    after = nn.Sequential(nn.ReLU(inplace=False), *small_vgg(inplace=False))
    torch.testing.assert_close(saliency_maps(after, images, targets, method), maps)


# Refusals


@pytest.mark.parametrize("method", SALIENCY_METHODS)
@pytest.mark.parametrize("target", [-1, CLASSES])
def test_a_target_that_is_no_logit_is_refused(method, target):
    images, _ = some_images(1)
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.4"):
        saliency_maps(small_vgg(), images, torch.tensor([target]), method)


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_shapes_that_do_not_fit_are_refused(method):
    images, targets = some_images()
    for wrong in [(images, targets[:2]), (images[0], targets[:3])]:
        with pytest.raises(ValueError, match="images must be"):
            saliency_maps(small_vgg(), *wrong, method)
    with pytest.raises(ValueError, match="logits"):
        saliency_maps(small_vgg()[:4], images, targets, method)


def test_an_unknown_method_is_refused():
    images, targets = some_images()
    with pytest.raises(InputError, match=r"saliency method 'grad_cam' is unknown.*gradcam"):
        saliency_maps(small_vgg(), images, targets, "grad_cam")
    with pytest.raises(InputError, match=r"saliency method 'grad_cam' is unknown.*gradcam"):
        class_saliency(small_vgg(), [(images, targets)], CLASSES, method="grad_cam")
    with pytest.raises(
        ValidationError, match=r"'grad_cam' is no saliency method; allowed: .*gradcam"
    ):
        Params(saliency={"method": "grad_cam"})


def test_the_methods_of_the_parameters():
    assert Params().saliency.method == "fullgrad"
    for method in SALIENCY_METHODS:
        assert Params(saliency={"method": method}).saliency.method == method


def test_captum_is_imported_only_when_it_is_used():
    check = "import sys, permafrost.params; assert 'captum' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


# Classes


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_a_class_map_is_the_rescaled_mean_of_its_images_maps(method):
    model, (images, _) = small_vgg(), some_images(5)
    with torch.no_grad():
        model[-1].weight[:2].abs_()  # so that something speaks for either class
    labels = torch.tensor([1, 0, 1, 1, 0])
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    result = class_saliency(model, batches, 2, method=method)
    maps = saliency_maps(model, images, labels, method)
    for label in range(2):
        mean = maps[labels == label].mean(0)
        expected = (mean - mean.min()) / (mean.max() - mean.min())
        torch.testing.assert_close(result.maps[label], expected, rtol=1e-9, atol=1e-9)
    if method in DECOMPOSED:
        assert 0 <= result.completeness < 1e-10
    else:
        assert result.completeness is None


def test_fullgrad_is_the_default():
    model, (images, targets) = small_vgg(), some_images()
    assert torch.equal(saliency_maps(model, images, targets), fullgrad(model, images, targets))
    batches = [(images, targets)]
    default, named = (class_saliency(model, batches, 4, **o) for o in ({}, {"method": "fullgrad"}))
    assert torch.equal(default.maps, named.maps)


@pytest.mark.parametrize("method", ["fullgrad", "simple_fullgrad", "smooth_fullgrad"])
def test_reading_reaches_the_fullgrad_methods(method):
    model, (images, targets) = small_vgg(), some_images()
    layer, channel = (
        saliency_maps(model, images, targets, method, reading=reading)
        for reading in ("layer", "channel")
    )
    assert not torch.allclose(layer, channel)
    with pytest.raises(ValueError, match="reading"):
        saliency_maps(model, images, targets, method, reading="other")


def test_smooth_completeness_is_the_worst_copys():
    """A logit that is broken by 1 is missed by about as much in every copy."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = small_vgg()

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images) + 1

    images, targets = some_images()
    with pytest.warns(UserWarning, match="no module"):
        result = class_saliency(Broken(), [(images, targets)], 4, method="smooth_fullgrad")
    assert result.completeness > 1e-2


# The stage


@pytest.fixture
def run_stage(monkeypatch, tmp_path, make_sequence, make_network):
    """Return a function that runs the stage by a method in an empty folder."""
    monkeypatch.chdir(tmp_path)
    save_tasks(tmp_path / "data/tasks/0.safetensors", make_sequence())
    network = make_network(width=0.1)
    vary(network).float()

    def run(method: str) -> dict:
        @contextmanager
        def open_stage(_name, _seed):
            yield SimpleNamespace(
                params=Params(saliency={"method": method}),
                device=torch.device("cpu"),
                first_network=lambda _seed: network,
                obtain=lambda _stage, _settings, _inputs, _code, make: make(),
            )

        monkeypatch.setattr(stage, "open_stage", open_stage)
        stage.run(0)
        tensors, about = load_tensors(tmp_path / "models/saliency/0.safetensors")
        assert (tmp_path / "reports/saliency/0.png").stat().st_size > 0
        return tensors | about

    return run


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_the_stage_uses_the_method(run_stage, capsys, method):
    written = run_stage(method)
    assert written["maps"].shape == (2, 32, 32)
    assert written["method"] == method
    printed = capsys.readouterr().out
    assert printed.startswith(f"saliency, seed 0: maps by {method}")
    assert ("add up" in printed) == (method in DECOMPOSED)
    assert (written["completeness_error"] is None) == (method not in DECOMPOSED)


def test_the_stages_maps_differ_by_method(run_stage):
    assert not torch.allclose(run_stage("fullgrad")["maps"], run_stage("gradcam")["maps"])


def test_the_stage_refuses_incomplete_terms(run_stage, monkeypatch):
    monkeypatch.setattr(ranking_method, "COMPLETENESS_BOUND", 0)
    with pytest.raises(ranking_method.IncompleteSaliency, match=r"smooth_fullgrad's terms miss"):
        run_stage("smooth_fullgrad")
    run_stage("gradcam")
