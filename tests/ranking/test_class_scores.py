"""Class scores against loops over single images, and a model left as it was."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from permafrost.ranking import RESPONSES, filter_responses, network_evidence
from responding import (
    CLASSES,
    Function,
    class_maps,
    in_batches,
    labelled_images,
    naive_maps,
    respond,
    small_network,
)


def naive_values(model, image, label):
    maps, logits = naive_maps(model, image)
    loss = -torch.log_softmax(logits[0], 0)[label]
    gradients = torch.autograd.grad(loss, list(maps.values()))
    values = {"activation": {}, "taylor": {}, "fisher": {}}
    for (name, map_), gradient in zip(maps.items(), gradients, strict=True):
        for kind in values.values():
            kind[name] = torch.empty(map_.shape[1], dtype=torch.float64)
        for index, (a, g) in enumerate(zip(map_[0].detach(), gradient[0], strict=True)):
            values["activation"][name][index] = a.abs().mean()
            values["taylor"][name][index] = (a * g).mean().abs()
            values["fisher"][name][index] = (a * g).sum() ** 2 / 2
    return values


def share_out(layer, x, relevance):
    """Hand relevance down in proportion to what each input adds to each output."""
    x = x.detach().requires_grad_()
    z = layer(x)
    shares = relevance / (z + torch.where(z < 0, -1e-13, 1e-13))
    return x.detach() * torch.autograd.grad((z * shares.detach()).sum(), x)[0]


def naive_relevance(model, image, label):
    """LRP of one image, with every BatchNorm written into its convolution's weights."""
    steps, x = [], image[None].double()
    children = list(model.named_children())
    for index, (name, layer) in enumerate(children):
        if isinstance(layer, nn.BatchNorm2d):
            continue
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.detach()
            norm = children[index + 1][1]
            if isinstance(norm, nn.BatchNorm2d):
                weight = weight * (
                    norm.weight / (norm.running_var + norm.eps).sqrt()
                ).detach().view(-1, 1, 1, 1)
                y = norm(layer(x))
            else:
                y = layer(x)
            positive = weight.clamp(min=0)
            steps.append((name, lambda x, w=positive: F.conv2d(x, w, padding=1), x))
        elif isinstance(layer, nn.ReLU):
            y = F.relu(x)
        else:
            y = layer(x)
            steps.append((name, layer, x))
        x = y.detach()
    relevance = torch.zeros_like(x)
    relevance[0, label] = x[0, label]
    found = {}
    for name, layer, x in reversed(steps):
        if isinstance(model.get_submodule(name), nn.Conv2d):
            found[name] = relevance[0].sum((1, 2))
        relevance = share_out(layer, x, relevance)
    return found


# What each criterion measures


@pytest.mark.parametrize("batch_norm", [True, False])
def test_scores_are_the_class_means_of_a_loop_over_images(batch_norm):
    model = small_network(batch_norm)
    images, labels = labelled_images()
    scores = respond(model, ["activation", "taylor", "fisher", "relevance"])
    by_image = [
        naive_values(model, image, label) | {"relevance": naive_relevance(model, image, label)}
        for image, label in zip(images, labels.tolist(), strict=True)
    ]
    for criterion in scores:
        for layer, values in scores[criterion].items():
            assert values.shape == (model.get_submodule(layer).out_channels, CLASSES)
            for label in range(CLASSES):
                own = [by_image[i][criterion][layer] for i in range(11) if i % CLASSES == label]
                expected = torch.stack(own).mean(0)
                torch.testing.assert_close(values[:, label], expected, rtol=1e-7, atol=1e-12)
                assert expected.abs().max() > 0


def test_feature_maps_are_read_before_they_are_overwritten():
    def network(inplace):
        torch.manual_seed(0)
        leaky = nn.LeakyReLU(0.5, inplace=inplace)
        body = [nn.ReLU(inplace=inplace), nn.Conv2d(3, 4, 3), leaky]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(224, CLASSES)).double()

    criteria = ["activation", "taylor", "fisher"]
    found, expected = (respond(network(inplace), criteria) for inplace in (True, False))
    for criterion in criteria:
        assert torch.equal(found[criterion]["1"], expected[criterion]["1"])


def test_layers_and_criteria_are_those_asked_for():
    model = small_network()
    scores = respond(model, ["fisher", "relevance"])
    assert list(scores) == ["fisher", "relevance"]
    for layers in scores.values():
        assert list(layers) == ["0", "4", "8"]


@pytest.mark.parametrize("size", [1, 5, 11])
def test_batches_make_no_difference(size):
    model = small_network()
    once, again = respond(model), respond(model, size=size)
    for criterion in RESPONSES:
        for layer, values in once[criterion].items():
            torch.testing.assert_close(again[criterion][layer], values, rtol=1e-10, atol=1e-14)


def test_scores_have_the_type_of_the_images():
    images, labels = labelled_images()
    double, single = (
        respond(small_network().to(dtype), data=(images.to(dtype), labels))
        for dtype in (torch.float64, torch.float32)
    )
    for criterion in RESPONSES:
        for layer, values in single[criterion].items():
            assert values.dtype == torch.float32
            torch.testing.assert_close(
                values.double(), double[criterion][layer], rtol=1e-3, atol=1e-6
            )


def test_channels_last_and_a_nested_view(make_network):
    network = make_network(classes=CLASSES)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % CLASSES
    scores = respond(network.view("shared", 0, 1), data=(images, labels))
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    again = respond(plain.view("shared", 0, 1), data=(images, labels))
    for criterion in RESPONSES:
        assert list(scores[criterion]) == list(network_evidence(network, 0).weights)
        for layer, values in scores[criterion].items():
            torch.testing.assert_close(values, again[criterion][layer], rtol=1e-3, atol=1e-6)


# Batches


@pytest.mark.parametrize("criteria", [["activation", "taylor", "fisher"], ["relevance"]])
def test_no_batch_is_kept_for_a_backward_pass(criteria):
    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    kept, ever, counts = weakref.WeakSet(), [], []

    def keep(tensor):
        ever.append(1)
        kept.add(box := Kept(tensor))
        return box

    def batches():
        for batch in in_batches(*labelled_images()):
            yield batch
            gc.collect()
            counts.append(len(kept))

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
        filter_responses(small_network(), batches(), CLASSES, criteria)
    assert ever
    assert counts == [0, 0, 0]


def test_batches_are_run_through_anew_where_they_can_be():
    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from in_batches(*labelled_images())

    loader, model = Loader(), small_network()
    found = filter_responses(model, loader, CLASSES, RESPONSES, class_maps())
    # One of their own for relevance, relevance_normalized, ablation, overlap and the two of paths.
    assert loader.passes == 1 + 6
    assert list(found) == list(RESPONSES)
    for criterion, layers in respond(model).items():
        for layer, values in layers.items():
            assert torch.equal(found[criterion][layer], values)


# The model is left alone


def snapshot(model):
    return {
        name: (
            sorted(module.__dict__),
            module.training,
            [len(h) for key, h in sorted(module.__dict__.items()) if key.endswith("_hooks")],
            [
                (p.requires_grad, None if p.grad is None else p.grad.clone(), p.data_ptr())
                for p in module.parameters(recurse=False)
            ],
            id(module),
        )
        for name, module in model.named_modules()
    }


def assert_same(model, before, state):
    assert str(snapshot(model)) == str(before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("criteria", [*[[name] for name in RESPONSES], list(RESPONSES)])
def test_the_model_is_left_as_it_was(criteria):
    model = small_network().train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    images, labels = labelled_images()
    given = images.clone()
    filter_responses(model, [(images, labels)], CLASSES, criteria, class_maps())
    assert torch.equal(images, given)
    assert not images.requires_grad
    assert_same(model, before, state)
    # A failure in the midst of it leaves nothing behind either.
    with pytest.raises((IndexError, RuntimeError)):
        respond(model, criteria, data=(images[:, :2], labels))
    assert_same(model, before, state)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()


def test_gradients_are_recorded_even_where_they_are_switched_off():
    model = small_network()
    expected = respond(model)
    with torch.no_grad():
        found = respond(model)
    for criterion in RESPONSES:
        for layer, values in expected[criterion].items():
            assert torch.equal(found[criterion][layer], values)


def test_training_mode_makes_no_difference():
    expected, found = respond(small_network()), respond(small_network().train())
    for criterion in RESPONSES:
        for layer, values in expected[criterion].items():
            assert torch.equal(found[criterion][layer], values)


# What is refused


@pytest.mark.parametrize("criterion", RESPONSES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite(criterion, value):
    images, labels = labelled_images()
    images[7, 0, 0, 0] = value
    with pytest.raises(ValueError, match="images hold values that are not finite"):
        respond(small_network(), [criterion], data=(images, labels))


@pytest.mark.parametrize("criterion", RESPONSES)
def test_responses_that_are_not_finite(criterion):
    model = small_network()
    with torch.no_grad():
        model[0].weight[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="the model's logits are not all finite"):
        respond(model, [criterion])


def test_unusable_requests():
    model, (images, labels) = small_network(), labelled_images()
    with pytest.raises(ValueError, match="criterion 'mse' looks at no images"):
        respond(model, ["mse", "taylor"])
    with pytest.raises(ValueError, match=r"classes without images: \[2\]"):
        respond(model, ["taylor"], data=(images[:2], labels[:2]))
    for wrong in (labels + 1, labels - 1):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
            respond(model, ["taylor"], data=(images, wrong))
    with pytest.raises(ValueError, match="images must be"):
        filter_responses(model, [(images, labels[:3])], CLASSES, ["taylor"])
    model[1] = nn.BatchNorm2d(4, track_running_stats=False).double()
    with pytest.raises(ValueError, match="without running statistics"):
        respond(model, ["taylor"])


def test_a_layer_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, images):
            return self.conv(self.conv(images)).mean((2, 3))

    class OneNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            for conv in self.convs:
                images = self.norm(conv(images))
            return images.mean((2, 3))

    for criterion in RESPONSES:
        with pytest.raises(ValueError, match="'conv' runs more than once"):
            respond(Twice().double(), [criterion])
        with pytest.raises(ValueError, match="'norm' runs more than once"):
            respond(OneNorm().double(), [criterion])


@pytest.mark.parametrize("criterion", RESPONSES)
@pytest.mark.parametrize(
    "wrap",
    [lambda y: (y, None), lambda y: {"logits": y}, lambda y: y[0]],
    ids=["tuple", "dict", "of one image"],
)
def test_models_that_do_not_return_logits(criterion, wrap):
    model = nn.Sequential(small_network(), Function(wrap))
    with pytest.raises(ValueError, match="must return logits"):
        respond(model, [criterion])


@pytest.mark.parametrize("criterion", RESPONSES)
def test_too_few_logits(criterion):
    data = [(labelled_images(4)[0], torch.arange(4))]
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        filter_responses(small_network(), data, 4, [criterion], torch.rand(4, 9, 10))


def test_labels_may_be_a_list_or_of_another_integer_type():
    model, (images, labels) = small_network(), labelled_images()
    expected = filter_responses(model, [(images, labels)], CLASSES, RESPONSES, class_maps())
    for other in (labels.tolist(), labels.int(), labels.to(torch.uint8)):
        found = filter_responses(model, [(images, other)], CLASSES, RESPONSES, class_maps())
        for criterion, layers in expected.items():
            for layer, values in layers.items():
                assert torch.equal(found[criterion][layer], values)
    with pytest.raises(ValueError, match="targets must be whole numbers"):
        filter_responses(model, [(images, labels.double())], CLASSES, RESPONSES, class_maps())
