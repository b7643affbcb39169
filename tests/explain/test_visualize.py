"""Filter visualisation: the plain loop, batches that agree, and a model left as it was."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18
from torchvision.models.vgg import make_layers

from explained import mixed, snapshot
from permafrost.explain import (
    conv_layers,
    heat_maps,
    natural_pictures,
    start_image,
    visualize_filters,
)

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)
FIRST, DEEP = "0", "11"  # convolutions of `small_vgg`
FILTERS = 16  # of the deep one


@pytest.fixture(autouse=True)
def _one_thread():
    """Small networks: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_vgg() -> nn.Sequential:
    """torchvision's layers, with its in-place ReLU, in one flat sequence."""
    torch.manual_seed(0)
    layers = make_layers([8, 8, "M", 16, "M", FILTERS, "M"], batch_norm=True)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def some_start(dtype: torch.dtype = torch.float32) -> Tensor:
    return start_image(16, MEAN, STD, seed=0).to(dtype)


def objectives(model: nn.Sequential, layer: str, images: Tensor) -> Tensor:
    """Mean over positions of every filter's convolution output: (N, filters)."""
    below = nn.Sequential(*list(model)[: int(layer) + 1]).eval()
    return below(images).mean((2, 3))


def naive_picture(model: nn.Sequential, layer: str, index: int, start: Tensor) -> Tensor:
    image = start.clone().unsqueeze(0).requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.1, weight_decay=1e-6)
    for _ in range(30):
        optimizer.zero_grad()
        (-objectives(model, layer, image.clone())[0, index]).backward()
        optimizer.step()
    return image.detach()[0]


# Pictures


@pytest.mark.parametrize("layer", [FIRST, DEEP])
def test_pictures_equal_the_plain_loop(layer):
    model, start = small_vgg().double(), some_start(torch.float64)
    pictures = visualize_filters(model, layer, [5, 0, 3], start=start, batch_size=2)
    for index, picture in zip([5, 0, 3], pictures, strict=True):
        expected = naive_picture(model, layer, index, start)
        torch.testing.assert_close(picture, expected, rtol=0, atol=1e-10)


def test_batched_equals_one_at_a_time_in_float64():
    model, start = small_vgg().double(), some_start(torch.float64)
    together = visualize_filters(model, DEEP, range(5), start=start)
    for index in range(5):
        alone = visualize_filters(model, DEEP, [index], start=start)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layer", [FIRST, DEEP])
def test_float32_pictures_do_not_depend_on_the_batch_size(layer):
    model, start = small_vgg(), some_start()
    filters = list(range(7))
    whole = visualize_filters(model, layer, filters, start=start, batch_size=64)
    for batch_size in (1, 2, 4, 8):
        parts = visualize_filters(model, layer, filters, start=start, batch_size=batch_size)
        assert torch.equal(parts, whole), batch_size


# Rounding


def ten_layers() -> nn.Sequential:
    """Deep enough for rounding to show."""
    torch.manual_seed(0)
    widths = [8, "M", 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64]
    model = make_layers(widths, batch_norm=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of these images alone
    with torch.no_grad():
        model(torch.randn(16, 3, 32, 32))
    return model.eval()


class Unfolded(nn.Module):
    """The same convolution as a matrix product, which adds up in another order."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        product = self.conv.weight.flatten(1) @ nn.functional.unfold(x, 3, padding=1)
        return product.unflatten(2, x.shape[2:]) + self.conv.bias.view(-1, 1, 1)


def another_program(model: nn.Sequential) -> tuple[nn.Sequential, str]:
    """The same network, all convolutions but the deepest unfolded; the deepest one's name."""
    deepest = list(conv_layers(model))[-1]
    below = [Unfolded(m) if isinstance(m, nn.Conv2d) else m for m in model[: int(deepest)]]
    return nn.Sequential(*below, *model[int(deepest) :]), deepest


def test_float64_pictures_of_a_deep_layer_do_not_depend_on_the_program():
    model = ten_layers().double()
    start = start_image(32, MEAN, STD, seed=0).double()
    other, deepest = another_program(model)
    pictures, others = (
        visualize_filters(program, deepest, range(16), start=start) for program in (model, other)
    )
    torch.testing.assert_close(pictures, others, rtol=0, atol=1e-9)


def steps_and_switches(
    model: nn.Sequential, layer: str, filters: int, start: Tensor
) -> list[tuple[Tensor, list[Tensor]]]:
    """The plain loop: images, which ReLUs are on and which positions are the largest, by step."""
    images = start.repeat(filters, 1, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.1, weight_decay=1e-6)
    steps = []
    for _ in range(30):
        switches, values = [], images.clone()
        for module in model[: int(layer) + 1]:
            if isinstance(module, nn.MaxPool2d):
                switches.append(nn.functional.max_pool2d(values, 2, 2, return_indices=True)[1])
            values = module(values)
            if isinstance(module, nn.ReLU):
                switches.append(values.detach() > 0)
        steps.append((images.detach().clone(), switches))
        objective = values[range(filters), range(filters)].mean((1, 2)).sum()
        (images.grad,) = torch.autograd.grad(-objective, images)
        optimizer.step()
    return steps


def test_float32_pictures_depend_on_the_program_only_where_a_unit_switches():
    model, start = ten_layers(), start_image(32, MEAN, STD, seed=0)
    other, deepest = another_program(model)
    paths = (steps_and_switches(program, deepest, 16, start) for program in (model, other))
    switched = torch.zeros(16, dtype=torch.bool)
    for (images, switches), (others, other_switches) in zip(*paths, strict=True):
        alike = (images - others).abs().amax((1, 2, 3)) < 1e-2
        assert alike[~switched].all()
        for here, there in zip(switches, other_switches, strict=True):
            switched |= (here != there).flatten(1).any(1)
    assert not switched.all()


@pytest.mark.parametrize("layer", [FIRST, DEEP])
def test_the_objective_rises(layer):
    model, start = small_vgg(), some_start()
    with torch.no_grad():
        before = objectives(model, layer, start.unsqueeze(0))[0]
        after = objectives(model, layer, visualize_filters(model, layer, start=start)).diagonal()
    assert (after > before).all()


def test_every_filter_is_visualised_by_default():
    pictures = visualize_filters(small_vgg(), DEEP, start=some_start(), steps=1)
    assert pictures.shape == (FILTERS, 3, 16, 16)
    assert not pictures.requires_grad


def test_no_steps_give_the_start_image():
    start = some_start()
    pictures = visualize_filters(small_vgg(), DEEP, [2], start=start, steps=0)
    assert torch.equal(pictures, start.unsqueeze(0))


def test_it_works_on_a_residual_network_under_no_grad():
    model = resnet18(weights=None)
    layer = list(conv_layers(model))[4]
    with torch.no_grad():
        pictures = visualize_filters(model, layer, [1, 2], start=some_start(), steps=2)
    assert pictures.shape == (2, 3, 16, 16)
    assert not torch.equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    ("count", "batch_size", "expected", "finished"),
    [(5, 2, [2, 2, 2], [2, 2, 1]), (1, 64, [2], [1]), (3, 64, [3], [3]), (2, 1, [2], [2])],
)
def test_batches_are_filled_up_and_never_of_one(count, batch_size, expected, finished):
    model, sizes, reported = small_vgg(), [], []
    model.register_forward_pre_hook(lambda _model, inputs: sizes.append(len(inputs[0])))
    visualize_filters(
        model,
        DEEP,
        range(count),
        start=some_start(),
        steps=1,
        batch_size=batch_size,
        on_batch=reported.append,
    )
    assert sizes == expected
    assert reported == finished


# The model afterwards


def test_the_model_and_the_start_image_are_unchanged():
    model, start = mixed(small_vgg()), some_start()
    before, kept = snapshot(model), start.clone()
    visualize_filters(model, DEEP, [0, 1], start=start, steps=2)
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)
    assert torch.equal(start, kept)


def test_the_model_is_unchanged_after_an_exception():
    def fail(_finished: int) -> None:
        raise KeyboardInterrupt

    model = mixed(small_vgg())
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        visualize_filters(model, DEEP, [0, 1], start=some_start(), steps=1, on_batch=fail)
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)


def test_only_the_layers_below_are_run():
    model, run = small_vgg(), []
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: run.append(int(name)))
    layer = list(conv_layers(model))[1]
    visualize_filters(model, layer, [0], start=some_start(), steps=1)
    assert run == list(range(int(layer)))


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
    with ConvolutionGradients() as recorder:
        visualize_filters(small_vgg(), DEEP, [0], start=some_start(), steps=1)
    assert recorder.masks == [[True, False, False]] * 4


# Refusals


@pytest.mark.parametrize(
    ("layer", "filters", "batch_size", "message"),
    [
        ("1", None, 64, "no convolution '1'"),
        (DEEP, [FILTERS], 64, "filters 0 to 15"),
        (DEEP, [-1], 64, "filters 0 to 15"),
        (DEEP, None, 0, "batch_size"),
    ],
)
def test_refusals(layer, filters, batch_size, message):
    with pytest.raises(ValueError, match=message):
        visualize_filters(small_vgg(), layer, filters, start=some_start(), batch_size=batch_size)


def test_a_batch_of_start_images_is_refused():
    with pytest.raises(ValueError, match="start"):
        visualize_filters(small_vgg(), DEEP, start=some_start().unsqueeze(0))


def test_a_layer_that_does_not_run_is_refused():
    model = small_vgg()
    model[0].spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="does not run"):
        visualize_filters(model, "0.spare", start=some_start())


# Layers, start images, heat maps


def test_conv_layers_come_in_order():
    assert list(conv_layers(small_vgg())) == ["0", "3", "7", "11"]
    assert next(iter(conv_layers(resnet18(weights=None)))) == "conv1"


def test_the_start_image_is_grey_noise_in_normalised_units():
    image = start_image(32, MEAN, STD, seed=3)
    pixels = (image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert 149.99 < pixels.min() < 151
    assert 179 < pixels.max() < 180.01


def test_the_start_image_depends_on_its_seed_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    image = start_image(8, MEAN, STD, seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(image, start_image(8, MEAN, STD, seed=3))
    assert not torch.equal(image, start_image(8, MEAN, STD, seed=4))


def test_heat_maps_by_hand():
    start = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    images = torch.tensor([2.0, -2.0, 6.0]).view(1, 3, 1, 1)
    assert heat_maps(images, start).item() == pytest.approx((1 + 4 + 3) / 3)
    assert heat_maps(images, start, "intensity").item() == 2
    assert heat_maps(images, start, "max").item() == 4


def test_heat_map_shapes_and_refusal():
    images, start = torch.randn(5, 3, 6, 7), torch.randn(3, 6, 7)
    assert heat_maps(images, start).shape == (5, 6, 7)
    with pytest.raises(ValueError, match="reduction"):
        heat_maps(images, start, "mean")


def test_jitter_rolls_each_step_and_back():
    """Of an image that is the same everywhere nothing changes; else it does, by its seed."""
    model, start = small_vgg(), some_start()
    plain = visualize_filters(model, DEEP, [0, 1], start=start, steps=4)
    found = [
        visualize_filters(model, DEEP, [0, 1], start=start, steps=4, jitter=2, jitter_seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], plain)
    one = nn.Sequential(nn.Conv2d(3, 4, 1))  # sees no position
    still = {"start": torch.ones(3, 8, 8), "steps": 3}
    assert torch.equal(
        visualize_filters(one, "0", **still), visualize_filters(one, "0", jitter=3, **still)
    )
    with pytest.raises(ValueError, match="jitter must be at least 0, not -1"):
        visualize_filters(model, DEEP, start=start, jitter=-1)


def test_natural_pictures_are_of_the_strongest_images():
    """Against a sort of all answers."""
    model, images = small_vgg().eval(), torch.randn(23, 3, 32, 32)
    batches = [(part, torch.zeros(len(part))) for part in images.split(5)]
    found = natural_pictures(model, [DEEP], batches, strongest=4)[DEEP]
    answers = {}
    handle = model.get_submodule(DEEP).register_forward_hook(
        lambda _m, _i, output: answers.update(all=output.mean((2, 3)))
    )
    with torch.no_grad():
        model(images)
    handle.remove()
    for index in range(len(found)):
        order = answers["all"][:, index].argsort(descending=True)[:4]
        torch.testing.assert_close(found[index], images[order].mean(0))
    everything = natural_pictures(model, [DEEP], batches, strongest=99)[DEEP]
    torch.testing.assert_close(everything[0], images.mean(0))
    with pytest.raises(ValueError, match="no images"):
        natural_pictures(model, [DEEP], [])
