"""Relevance: by hand, beside Captum, through any layers, and where it is not conserved."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from permafrost.explain import conv_layers
from permafrost.freezing import batch_norm_after, frozen_filters
from permafrost.models.units import is_norm
from permafrost.ranking import FilterRelevance
from responding import CLASSES, Function, Head, kept_logits, labelled_images, respond, small_network


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
    ids=["gate", "softmax", "constant", "layer_norm", "GroupNorm", "Sigmoid", "Softplus"],
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


def test_relevance_inside_frozen_filters():
    model = small_network()
    expected = respond(model, ["relevance"])["relevance"]
    with frozen_filters(model, {"0": torch.tensor([True, False, True, False])}):
        found = respond(model, ["relevance"])["relevance"]
    for name, values in expected.items():
        assert torch.equal(found[name], values)
