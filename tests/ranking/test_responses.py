"""Response criteria against loops over single images, LRP by hand, and a model left as it was."""

import copy
import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from permafrost.artifacts import load_tensors, save_tasks, save_tensors
from permafrost.data import Batches
from permafrost.errors import InputError
from permafrost.experiment import new_network
from permafrost.explain import conv_layers
from permafrost.freezing import batch_norm_after, frozen_filters
from permafrost.models.units import is_norm
from permafrost.params import Params
from permafrost.ranking import (
    CONTROLS,
    METRICS,
    RESPONSES,
    Evidence,
    FilterRelevance,
    check_criterion,
    combine_classes,
    filter_responses,
    needs_maps,
    network_evidence,
    order_filters,
    score_filters,
)
from permafrost.ranking import method as ranking_method
from permafrost.stages import rank as stage
from permafrost.stages.workspace import FILTERS, FIRST, RANKS, SALIENCY, TASKS, seed_file

CLASSES = 3


def small_network(batch_norm=True, bias=True):
    """Three convolutions with in-place ReLUs, as the project's networks are built."""
    torch.manual_seed(3)
    layers = []
    for inputs, outputs in ((3, 4), (4, 6), (6, 5)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias))
        if batch_norm:
            norm = nn.BatchNorm2d(outputs)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
            layers.append(norm)
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, CLASSES, bias=bias)]
    return nn.Sequential(*layers, *head).double().eval()


def labelled_images(count=11):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, 9, 10, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % CLASSES


def in_batches(images, labels, size=4):
    return zip(images.split(size), labels.split(size), strict=True)


def respond(model, criteria=RESPONSES, size=4, data=None):
    images, labels = data or labelled_images()
    return filter_responses(model, in_batches(images, labels, size), CLASSES, criteria)


def naive_maps(model, image):
    """Run one image through; return the feature maps by convolution, and the logits."""
    maps, x, layers = {}, image[None], list(model.named_children())
    for index, (name, layer) in enumerate(layers):
        x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
        if isinstance(layer, nn.Conv2d):
            conv = name
            followed = isinstance(layers[index + 1][1], nn.BatchNorm2d)
        if isinstance(layer, nn.BatchNorm2d) or (isinstance(layer, nn.Conv2d) and not followed):
            maps[conv] = x
    return maps, x


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
    scores = respond(model)
    by_image = [
        naive_values(model, image, label) | {"relevance": naive_relevance(model, image, label)}
        for image, label in zip(images, labels.tolist(), strict=True)
    ]
    for criterion in RESPONSES:
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


# Relevance


def test_relevance_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 2, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    ).double()
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([1.0, 2]).view(2, 1, 1, 1)
        model[0].bias[:] = 0
        # Of a pixel of 1, the first layer makes 1 and 2; the second 3 + 1 and 8 - 4.
        model[2].weight[:] = torch.tensor([[1.0, 1], [-1, 4]]).view(2, 2, 1, 1)
        model[2].bias[:] = torch.tensor([1.0, -3])
        model[6].weight[:] = torch.tensor([[2.0, -1], [0, 1]])
        model[6].bias[:] = torch.tensor([3.0, 0])
    images = torch.tensor([[[[1.0]]], [[[1.0]]]], dtype=torch.float64)
    relevance = FilterRelevance(model)(images, torch.tensor([0, 1]))
    # Logits 2*4 - 4 + 3 = 7 and 4. The bias of 3 keeps its share.
    second = torch.tensor([[8.0, -4], [0, 4]], dtype=torch.float64)
    # The first unit of the second layer draws 1 and 2 from the first layer; the other draws -1,
    # which is left out, and 8.
    first = torch.tensor([[8 / 3, 16 / 3 - 4], [0, 4]], dtype=torch.float64)
    torch.testing.assert_close(relevance["2"], second, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(relevance["0"], first, rtol=1e-8, atol=1e-8)


def test_without_biases_every_layer_holds_the_whole_logit():
    model = small_network(batch_norm=False, bias=False)
    images, labels = labelled_images()
    logits = model(images).gather(1, labels[:, None])[:, 0].detach()
    for values in FilterRelevance(model)(images, labels).values():
        torch.testing.assert_close(values.sum(1), logits, rtol=1e-6, atol=1e-8)


def test_relevance_leaves_a_units_bias_out_even_where_nothing_else_moves_it():
    model = small_network(batch_norm=False)
    with torch.no_grad():
        model[0].bias.fill_(-100)  # the later layers then see their biases alone
        model[3].bias.fill_(1)
    relevance = FilterRelevance(model)(*labelled_images())
    assert (relevance["0"] == 0).all()
    assert (relevance["6"] != 0).any()
    assert all(torch.isfinite(values).all() for values in relevance.values())


class Written(nn.Module):
    """One function, as modules or as written into `forward`."""

    def __init__(self, kind, activation=nn.ReLU):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6))
        self.norm, self.act = nn.BatchNorm2d(6), activation()
        nn.init.uniform_(self.norm.weight, -1.5, 1.5)
        # So much that no filter is active by its bias alone.
        nn.init.uniform_(self.norm.bias, 0.3, 1)
        nn.init.uniform_(self.conv1.bias, 1, 2)
        self.pool, self.flatten, self.head = nn.AvgPool2d(9), nn.Flatten(), nn.Linear(6, CLASSES)
        self.double().eval()

    def forward(self, x):
        if self.kind == "modules":
            x = self.act(self.norm(self.conv2(self.act(self.conv1(x)))))
            return self.head(self.flatten(self.pool(self.act(self.conv3(x)))))
        x = self.conv1(x).relu()
        if self.kind == "functions":
            x = F.conv2d(input=x, weight=self.conv2.weight, bias=self.conv2.bias, padding=1)
            x = F.relu_(F.conv2d(F.relu(self.norm(x)), self.conv3.weight, self.conv3.bias, 1, 1))
        else:
            y = self.conv3(F.relu(self.norm(self.conv2(x))))
            x = F.relu(x + y if self.kind == "sum" else torch.cat([x, y], 1)[:, 3:9])
        return F.linear(x.mean((2, 3)), self.head.weight, self.head.bias)


def square_images():
    return labelled_images()[0][..., :9], labelled_images()[1]


def kept_logits(model, images, labels):
    """Return the labels' logits less the bias of the last layer."""
    return (model(images) - model.head.bias).gather(1, labels[:, None])[:, 0].detach()


def test_relevance_of_functions_is_that_of_modules():
    images, labels = square_images()
    expected, found = (
        FilterRelevance(Written(kind))(images, labels) for kind in ("modules", "functions")
    )
    # The second convolution and the third are functions: only the first is a filter's layer.
    assert list(found) == ["conv1"]
    torch.testing.assert_close(found["conv1"], expected["conv1"], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["sum", "concatenation"])
def test_relevance_runs_through_sums_and_concatenations(kind):
    images, labels = square_images()
    model = Written(kind)
    found = FilterRelevance(model)(images, labels)
    assert list(found) == ["conv1", "conv2", "conv3"]
    # Where the paths meet again, the first layer holds all of it.
    kept = kept_logits(model, images, labels)
    torch.testing.assert_close(found["conv1"].sum(1), kept, rtol=1e-8, atol=1e-12)
    assert (found["conv3"].sum(1) - kept).abs().min() > 1e-4


@pytest.mark.parametrize(
    "activation", [nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Tanh]
)
def test_activations_pass_relevance_on(activation):
    images, labels = square_images()
    model = Written("modules", activation)
    kept = kept_logits(model, images, labels)
    for values in FilterRelevance(model)(images, labels).values():
        torch.testing.assert_close(values.sum(1), kept, rtol=1e-8, atol=1e-12)
    if activation in (nn.ReLU6, nn.SiLU, nn.Hardswish, nn.ELU):
        again = Written("modules", lambda: activation(inplace=True))
        again = FilterRelevance(again)(images, labels)
        for name, values in FilterRelevance(model)(images, labels).items():
            torch.testing.assert_close(again[name], values, rtol=1e-10, atol=1e-14)


def test_relevance_of_signed_inputs_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1), nn.Flatten(), nn.Linear(1, 1))
    with torch.no_grad():
        for index, values in ((0, [3.0, -2]), (1, [2.0, -4]), (3, [1.0])):
            model[index].weight.copy_(torch.tensor(values).view_as(model[index].weight))
            model[index].bias.zero_()
        model[1].bias.fill_(7)
    # The first layer gives 3 and -2; times 2 and -4 they raise the second by 6 and 8, to 21.
    found = FilterRelevance(model)(torch.ones(1, 1, 1, 1), torch.tensor([0]))
    torch.testing.assert_close(found["1"], torch.tensor([[21.0]], dtype=torch.float64))
    torch.testing.assert_close(found["0"], torch.tensor([[9.0, 12]], dtype=torch.float64))


def captum_relevance(model, images, labels):
    """LRP by captum, which sees modules only, on folded norms."""
    from captum.attr import LayerLRP
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule

    network = copy.deepcopy(model).eval().double()
    for conv, norm in batch_norm_after(network).items():
        folded = fuse_conv_bn_eval(*(network.get_submodule(name) for name in (conv, norm)))
        network.set_submodule(conv, folded)
        network.set_submodule(norm, nn.Identity())
    layers = conv_layers(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.rule = Alpha1_Beta0_Rule(set_bias_to_zero=True)
        elif isinstance(module, nn.Flatten | nn.Identity):
            module.rule = EpsilonRule()
    inputs = images.double().requires_grad_()
    relevance = LayerLRP(network, list(layers.values())).attribute(inputs, target=labels)
    return {name: v.detach().sum((2, 3)) for name, v in zip(layers, relevance, strict=True)}


def test_relevance_equals_captums(make_network):
    network = make_network(classes=CLASSES)
    for norm in filter(is_norm, network.modules()):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % CLASSES
    model = network.view("shared", 0, 1)
    expected = captum_relevance(model, images, labels)
    found = FilterRelevance(model)(images, labels)
    assert list(found) == list(expected)
    for name, values in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6 * scale)
        assert torch.equal(values.sum(0).argsort(), expected[name].sum(0).argsort())


class Head(nn.Module):
    """One convolution and what is to be explained behind it."""

    def __init__(self, behind):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.behind, self.head = nn.Conv2d(3, 4, 3), behind, nn.Linear(4, CLASSES)
        self.double().eval()

    def forward(self, x):
        return self.head(self.behind(F.relu(self.conv(x))).mean((2, 3)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "behind",
    [
        Function(lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))),
        Function(lambda x: x.softmax(1)),
        Function(lambda x: x + 0.5),
        Function(lambda x: F.layer_norm(x, x.shape[1:])),
        nn.GroupNorm(2, 4),
        nn.Sigmoid(),
        nn.Softplus(),
    ],
)
def test_relevance_that_is_not_conserved_is_refused(behind):
    model = Head(behind)
    with pytest.raises(ValueError, match=r"'relevance' cannot explain.*conserved") as e:
        respond(model, ["relevance"])
    assert "\n" not in str(e.value)
    assert respond(model, ["taylor"])["taylor"]["conv"].shape == (4, CLASSES)


@pytest.mark.parametrize("behind", [nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2)])
def test_what_biases_keep_is_known(behind):
    if isinstance(behind, nn.BatchNorm2d):
        nn.init.uniform_(behind.running_mean, -0.5, 0.5)
        nn.init.uniform_(behind.bias, -0.5, 0.5)
    values = FilterRelevance(Head(behind))(*labelled_images())["conv"]
    assert (values != 0).any()


def test_relevance_keeps_no_graph():
    images, labels = labelled_images()
    model = small_network()
    for values in FilterRelevance(model)(images, labels).values():
        assert not values.requires_grad
    for layers in respond(model).values():
        assert not any(values.requires_grad for values in layers.values())


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
    found = filter_responses(model, loader, CLASSES, RESPONSES)
    assert loader.passes == 2  # one for relevance
    assert list(found) == list(RESPONSES)
    for criterion, layers in respond(model).items():
        for layer, values in layers.items():
            assert torch.equal(found[criterion][layer], values)


# Which module a filter's feature map is read from


class Grouped(nn.Module):
    """Norms are registered behind all convolutions; one head runs in training only."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.second, self.first = nn.Conv2d(6, 6, 3), nn.Conv2d(3, 6, 3)
        self.auxiliary = nn.Conv2d(6, 6, 1)
        self.norms = nn.ModuleList([norm(6), norm(6)])
        self.head = nn.Linear(6, CLASSES)
        for module in self.norms:
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        self.double().eval()

    def forward(self, x):
        x = F.relu(self.norms[0](self.first(x)))
        if self.training:
            self.auxiliary(x)
        self.maps = self.norms[1](self.second(x))
        return self.head(F.relu(self.maps).mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d])
def test_feature_maps_lie_behind_the_norm_of_the_data_flow(norm):
    model, (images, labels) = Grouped(norm), labelled_images()
    scores = respond(model)
    model(images)
    maps = model.maps.detach().abs().mean((2, 3))
    expected = torch.stack([maps[labels == label].mean(0) for label in range(CLASSES)], 1)
    torch.testing.assert_close(scores["activation"]["second"], expected, rtol=1e-8, atol=1e-12)
    kept = kept_logits(model, images, labels)
    expected = torch.stack([kept[labels == label].mean() for label in range(CLASSES)])
    torch.testing.assert_close(scores["relevance"]["second"].sum(0), expected)
    gammas = network_evidence(model, 0).gammas
    assert torch.equal(gammas["second"], model.norms[1].weight.detach())
    for layers in scores.values():
        assert list(layers) == ["first", "second"]  # as they run


def test_what_does_not_run_is_no_filter():
    model = Grouped()
    evidence = network_evidence(model, 0)
    assert sorted(evidence.weights) == ["first", "second"]
    evidence = replace(evidence, class_scores=respond(model))
    for criterion in (*CONTROLS, *RESPONSES):
        assert sorted(score_filters(criterion, evidence)) == ["first", "second"]


def test_what_the_logits_do_not_depend_on_counts_nothing():
    class Idle(Head):
        def forward(self, x):
            self.idle = self.behind(x)
            return self.head(F.relu(self.conv(x)).mean((2, 3)))

    scores = respond(Idle(nn.Conv2d(3, 5, 1)))
    for criterion in ("taylor", "fisher", "relevance"):
        assert torch.equal(scores[criterion]["behind"], torch.zeros(5, CLASSES).double())
    assert (scores["activation"]["behind"] > 0).all()


def test_a_norm_that_contains_its_activation():
    class ActiveNorm(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    model, plain = Grouped(ActiveNorm), Grouped()
    images, labels = labelled_images()
    found, expected = respond(model), respond(plain)
    plain(images)
    maps = plain.maps.detach().relu().mean((2, 3))
    active = torch.stack([maps[labels == label].mean(0) for label in range(CLASSES)], 1)
    torch.testing.assert_close(found["activation"]["second"], active, rtol=1e-8, atol=1e-12)
    for layer, values in expected["relevance"].items():
        torch.testing.assert_close(found["relevance"][layer], values, rtol=1e-8, atol=1e-12)


def test_a_network_that_cannot_be_followed():
    class Picky(nn.Sequential):
        def forward(self, x):
            assert x.shape[1] == 3
            assert x.shape[2:] == (9, 10)
            return super().forward(x)

    model = Picky(*small_network())
    evidence = network_evidence(model, 0)
    for criterion in ("random", "magnitude"):
        assert list(score_filters(criterion, evidence)) == ["0", "4", "8"]
    with pytest.raises(InputError, match="'bn_gamma' needs a BatchNorm"):
        score_filters("bn_gamma", evidence)
    for criterion, layers in respond(model).items():
        for layer, values in layers.items():
            assert torch.equal(values, respond(small_network(), [criterion])[criterion][layer])


DERIVED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm parametrization": nn.utils.parametrizations.weight_norm,
    "spectral_norm parametrization": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, that some of these are old
@pytest.mark.parametrize("kind", DERIVED)
def test_magnitude_is_that_of_the_weights_that_run(kind):
    def network(seed):
        torch.manual_seed(seed)
        body = [DERIVED[kind](nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, CLASSES)).double()

    model, other = network(0).eval(), network(1).eval()
    model.load_state_dict(other.state_dict())
    state = copy.deepcopy(model.state_dict())
    found = network_evidence(model.train(), 0).weights["0"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    images, labels = labelled_images()
    model.eval()(images)
    torch.testing.assert_close(found, model[0].weight.detach())
    # The copy that relevance works on has the derived weights too.
    values = FilterRelevance(model)(images, labels)["0"].sum(1)
    kept = (model(images) - model[4].bias).gather(1, labels[:, None])[:, 0].detach()
    torch.testing.assert_close(values, kept, rtol=1e-8, atol=1e-12)


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
    filter_responses(model, [(images, labels)], CLASSES, criteria)
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
@pytest.mark.parametrize("wrap", [lambda y: (y, None), lambda y: {"logits": y}, lambda y: y[0]])
def test_models_that_do_not_return_logits(criterion, wrap):
    model = nn.Sequential(small_network(), Function(wrap))
    with pytest.raises(ValueError, match="must return logits"):
        respond(model, [criterion])


@pytest.mark.parametrize("criterion", RESPONSES)
def test_too_few_logits(criterion):
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        filter_responses(
            small_network(), [(labelled_images(4)[0], torch.arange(4))], 4, [criterion]
        )


def test_labels_may_be_a_list_or_of_another_integer_type():
    model, (images, labels) = small_network(), labelled_images()
    expected = filter_responses(model, [(images, labels)], CLASSES, RESPONSES)
    for other in (labels.tolist(), labels.int(), labels.to(torch.uint8)):
        found = filter_responses(model, [(images, other)], CLASSES, RESPONSES)
        for criterion, layers in expected.items():
            for layer, values in layers.items():
                assert torch.equal(found[criterion][layer], values)
    with pytest.raises(ValueError, match="targets must be whole numbers"):
        filter_responses(model, [(images, labels.double())], CLASSES, RESPONSES)


# As criteria


def test_kinds_of_criteria():
    assert not set(METRICS) & set(CONTROLS) | set(CONTROLS) & set(RESPONSES)
    assert needs_maps("mse")
    assert needs_maps("custom.centre_distance:centre_distance")
    for name in (*CONTROLS, *RESPONSES):
        check_criterion(name)
        assert not needs_maps(name)


def test_response_criteria_rank_by_their_class_scores():
    model = small_network()
    evidence = replace(network_evidence(model, 0), class_scores=respond(model))
    for criterion in RESPONSES:
        scores = score_filters(criterion, evidence)
        assert list(scores) == list(evidence.weights)
        for layer, values in scores.items():
            assert torch.equal(values, evidence.class_scores[criterion][layer])
            assert order_filters(values)[0] == values[:, 0].argmax()


def test_response_criteria_need_class_scores():
    evidence = network_evidence(small_network(), 0)
    partial = replace(evidence, class_scores={"taylor": {"0": torch.ones(3, CLASSES)}})
    for unusable in (evidence, partial):
        with pytest.raises(InputError, match="'taylor' gave no class scores of layer '0'"):
            score_filters("taylor", unusable)


def test_bn_gamma_is_the_size_of_gamma():
    model = small_network()
    scores = score_filters("bn_gamma", network_evidence(model, 0))
    for conv, norm in (("0", 1), ("4", 5), ("8", 9)):
        expected = model[norm].weight.detach().abs().float()[:, None]
        assert (model[norm].weight < 0).any()
        assert torch.equal(scores[conv], expected)
        assert not scores[conv].requires_grad


def test_bn_gamma_without_batch_norm():
    partly = small_network()
    partly[5] = nn.Identity()
    without_gamma = small_network()
    without_gamma[5] = nn.BatchNorm2d(6, affine=False).double()
    for model, layer in ((small_network(batch_norm=False), 0), (partly, 4), (without_gamma, 4)):
        with pytest.raises(InputError, match=f"'bn_gamma' needs a BatchNorm .* layer {layer} has"):
            score_filters("bn_gamma", network_evidence(model, 0))


# One map of all classes


def hand_made_evidence():
    class_maps = torch.tensor([[[0.0, 1], [0, 0]], [[0, 0.5], [1, 0]], [[0, 0], [0.8, 0.1]]])
    return Evidence(
        weights={"conv": torch.ones(3, 1, 1, 1)},
        filter_maps={"conv": torch.eye(4)[:3].view(3, 2, 2)},
        class_maps=class_maps,
        seed=4,
        gammas={"conv": torch.ones(3)},
        class_scores={"taylor": {"conv": torch.tensor([[1.0, 2, 6], [9, 0, 0], [2, 2, 2]])}},
    )


def test_combined_maps_and_scores():
    evidence = hand_made_evidence()
    combined = combine_classes(evidence)
    # Means 0, 0.5, 0.6 and 0.1 / 3.
    expected = torch.tensor([[[0, 0.5 / 0.6], [1, 0.1 / 1.8]]])
    torch.testing.assert_close(combined.class_maps, expected)
    assert combined.class_scores["taylor"]["conv"].tolist() == [[3], [3], [2]]
    assert combined.weights is evidence.weights
    assert combined.filter_maps is evidence.filter_maps
    assert (combined.seed, combined.gammas) == (4, evidence.gammas)
    # Filter 2 lights up where the combined map does most, filter 0 where it is dark.
    order = order_filters(score_filters("mse", combined)["conv"], "combined")
    assert order.tolist() == [2, 1, 0]
    order = order_filters(score_filters("taylor", combined)["conv"], "combined")
    assert order.tolist() == [0, 1, 2]


def test_combined_maps_without_contrast_or_without_maps():
    complements = replace(hand_made_evidence(), class_maps=torch.eye(2)[:, None])
    assert torch.equal(combine_classes(complements).class_maps, torch.zeros(1, 1, 2))
    assert combine_classes(replace(complements, class_maps=None)).class_maps is None


def test_combined_maps_that_are_not_finite():
    maps = hand_made_evidence().class_maps.clone()
    maps[1, 0, 0] = math.nan
    combined = combine_classes(replace(hand_made_evidence(), class_maps=maps))
    with pytest.raises(ValueError, match="not finite"):
        score_filters("mse", combined)


def test_combined_orders_take_one_score_per_filter():
    with pytest.raises(ValueError, match=r"'combined' needs scores \(F, 1\), not \(3, 2\)"):
        order_filters(torch.ones(3, 2), "combined")
    assert order_filters(torch.tensor([[1.0], [3], [2]]), "combined").tolist() == [1, 2, 0]


# In the workflow


@pytest.mark.parametrize("criterion", ["random", "magnitude", "bn_gamma", *RESPONSES])
def test_later_tasks_are_ranked_by_what_the_criterion_needs(
    criterion, make_network, make_sequence, monkeypatch
):
    def refuse(*_args, **_options):
        raise AssertionError("maps were made for a criterion that looks at none")

    monkeypatch.setattr(ranking_method, "class_saliency", refuse)
    monkeypatch.setattr(ranking_method, "visualize_network", refuse)
    sequence, model = make_sequence(), make_network().view("shared", 0, 1)
    batches = Batches(sequence.tasks[0].train, sequence.normalization, "cpu")
    for aggregate in ("union", "combined"):
        config = ranking_method.ExplainConfig(aggregate=aggregate)
        orders = ranking_method.rank_network(
            model, batches, 2, sequence.normalization, criterion, config, 0
        )
        evidence = network_evidence(model, 0)
        if criterion in RESPONSES:
            scores = filter_responses(model, batches.ordered(64), 2, [criterion])
            evidence = replace(evidence, class_scores=scores)
        for layer, scores in score_filters(criterion, evidence).items():
            if aggregate == "combined":
                scores = scores.mean(1, keepdim=True)
            assert torch.equal(orders[layer], order_filters(scores, aggregate))


def test_combined_ranks_maps_against_one_map():
    evidence = hand_made_evidence()
    config = ranking_method.ExplainConfig(aggregate="combined")
    scores, orders = ranking_method.order_layers("mse", evidence, config)
    assert scores["conv"].shape == (3, 1)
    assert orders["conv"].tolist() == [2, 1, 0]
    # Each class by itself: filter 1 is class 0's map.
    _, orders = ranking_method.order_layers("mse", evidence, replace(config, aggregate="union"))
    assert orders["conv"].tolist()[0] == 1


@pytest.fixture
def rank(tmp_path, monkeypatch, make_sequence):
    """Return a run of the stage in a project whose earlier stages are made up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    sequence, generator = make_sequence(), torch.Generator().manual_seed(0)
    shown = []
    monkeypatch.setattr(stage, "draw_best_and_worst", lambda *args: shown.append(args[-1]))

    def run(metrics, aggregate="union"):
        params = Params.model_validate(
            {
                "split": {"classes_per_task": 2},
                "model": {"arch": "vgg11", "width": 0.05},
                "rank": {"metrics": metrics, "aggregate": aggregate},
                "freeze": {"metric": metrics[0]},
                "sweep": {"metrics": metrics},
                "runtime": {"device": "cpu"},
            }
        )
        # JSON is YAML too.
        Path("params.yaml").write_text(params.model_dump_json())
        network = new_network(params, 0)
        layers = network_evidence(network, 0).weights
        maps = {
            f"{name}/maps": torch.rand(len(weight), 32, 32, generator=generator)
            for name, weight in layers.items()
        }
        class_maps = torch.rand(2, 32, 32, generator=generator)
        save_tasks(seed_file(TASKS, 0), sequence)
        save_tensors(seed_file(FIRST, 0), network.state_dict())
        save_tensors(seed_file(FILTERS, 0), maps, {})
        save_tensors(seed_file(SALIENCY, 0), {"maps": class_maps}, {"classes": ["a", "b"]})
        stage.run(0)
        return network, sequence, load_tensors(seed_file(RANKS, 0))[0], shown

    return run


def test_the_stage_ranks_by_the_first_tasks_training_images(rank):
    network, sequence, ranks, shown = rank(["taylor", "bn_gamma", "pearson", "relevance"])
    batches = Batches(sequence.tasks[0].train, sequence.normalization, "cpu")
    model = network.view("shared", 0, 1)
    expected = filter_responses(model, batches.ordered(64), 2, ["taylor", "relevance"])
    for criterion, layers in expected.items():
        for layer, scores in layers.items():
            assert torch.equal(ranks[f"{criterion}/{layer}/scores"], scores)
            assert torch.equal(ranks[f"{criterion}/{layer}/order"], order_filters(scores))
    assert ranks["bn_gamma/features.0/scores"].shape == (3, 1)
    assert shown == ["pearson"]  # the first that compares maps


def test_the_stage_combines_classes(rank):
    _, _, ranks, shown = rank(["fisher", "mse"], aggregate="combined")
    for criterion in ("fisher", "mse"):
        assert ranks[f"{criterion}/features.0/scores"].shape == (3, 1)
    assert shown == ["mse"]


def test_the_stage_reads_no_images_without_need(rank, monkeypatch):
    monkeypatch.delattr(stage, "load_tasks")
    _, _, ranks, shown = rank(["random", "magnitude"])
    assert "magnitude/features.0/order" in ranks
    assert shown == ["mse"]


def test_relevance_inside_frozen_filters():
    model = small_network()
    expected = respond(model, ["relevance"])["relevance"]
    with frozen_filters(model, {"0": torch.tensor([True, False, True, False])}):
        found = respond(model, ["relevance"])["relevance"]
    for name, values in expected.items():
        assert torch.equal(found[name], values)
