"""Users' own criteria of each kind and own saliency methods: used, or refused in one line."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from permafrost.data import Batches
from permafrost.errors import InputError
from permafrost.explain import class_saliency, saliency_maps
from permafrost.ranking import (
    CRITERIA,
    filter_responses,
    needs_images,
    needs_maps,
    network_evidence,
    order_filters,
    score_filters,
)
from permafrost.ranking.method import ExplainConfig, rank_network

OWN = """
import torch
from permafrost.explain import saliency_method
from permafrost.ranking import class_means, map_metric, network_criterion
from permafrost.ranking import response_criterion, weights_criterion

@map_metric(higher_is_better=False)
def gap(filter_maps, class_maps):
    return (filter_maps.mean((1, 2))[:, None] - class_maps.mean((1, 2))).abs()

@weights_criterion
def peak(evidence):
    return {name: weight.flatten(1).amax(1, True) for name, weight in evidence.weights.items()}

@response_criterion
def loudest(feature_map, gradient):
    return feature_map.amax((2, 3))

@network_criterion
def first_bias(model, batches, classes):
    assert not model.training
    means = class_means(lambda images, labels: {"all": images.mean((2, 3))}, batches, classes)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    return {n: means["all"].mean(0).repeat(m.out_channels, 1) for n, m in layers.items()}

@saliency_method
def brightness(model, images, targets):
    assert not model.training and torch.is_grad_enabled()
    return images.mean(1)
"""


@pytest.fixture
def shown(make_sequence, make_network):
    """Return a network, its first task's batches and their normalisation."""
    sequence = make_sequence()
    batches = Batches(sequence.tasks[0].train, sequence.normalization, "cpu")
    return make_network().view("shared", 0, 1).train(), batches, sequence.normalization


@pytest.mark.parametrize("name", ["gap", "peak", "loudest", "first_bias"])
@pytest.mark.parametrize("aggregate", ["union", "combined"])
def test_an_own_criterion_orders_every_layer(write_own, shown, name, aggregate):
    model, batches, normalization = shown
    name = f"{write_own(OWN)}:{name}"
    config = ExplainConfig(steps=1, aggregate=aggregate)
    orders = rank_network(model, batches, 2, normalization, name, config, 0)
    assert list(orders) == list(network_evidence(model, 0).weights)
    for layer, order in orders.items():
        filters = model.get_submodule(layer).out_channels
        assert order.sort().values.tolist() == list(range(filters))


def test_what_own_criteria_look_at(write_own):
    own = write_own(OWN)
    assert {name for name in ("gap", "peak", "loudest") if needs_maps(f"{own}:{name}")} == {"gap"}
    assert [needs_images(f"{own}:{name}") for name in ("peak", "loudest", "first_bias")] == [
        False,
        True,
        True,
    ]
    assert CRITERIA.home(f"{own}:peak") == own
    assert f"{own}:peak" not in CRITERIA


def test_an_edit_does_not_reach_what_runs(write_own):
    own = write_own(OWN)
    found = CRITERIA.find(f"{own}:peak")
    Path(f"{own.replace('.', '/')}.py").write_text("edited(")
    assert CRITERIA.find(f"{own}:peak") is found
    with pytest.raises(InputError, match="has no 'other'"):
        CRITERIA.find(f"{own}:other")


def test_own_scores_are_those_that_were_declared(write_own, shown):
    model, batches, _ = shown
    own = write_own(OWN)
    evidence = network_evidence(model, 0)
    maps = {layer: torch.rand(len(w), 4, 4) for layer, w in evidence.weights.items()}
    compared = replace(evidence, filter_maps=maps, class_maps=torch.rand(2, 4, 4))
    gap = CRITERIA[f"{own}:gap"]
    for layer, scores in score_filters(f"{own}:gap", compared).items():  # lower is better
        assert torch.equal(scores, -gap(maps[layer], compared.class_maps))
    for layer, scores in score_filters(f"{own}:peak", evidence).items():
        assert torch.equal(scores[:, 0], evidence.weights[layer].flatten(1).amax(1))
    criteria = [f"{own}:loudest", "activation", f"{own}:first_bias"]
    found = filter_responses(model, batches.ordered(3), 2, criteria)
    assert list(found) == criteria
    alone = filter_responses(model, batches.ordered(3), 2, ["activation"])
    for layer, scores in found[f"{own}:loudest"].items():
        assert scores.shape == (model.get_submodule(layer).out_channels, 2)
        assert torch.equal(found["activation"][layer], alone["activation"][layer])
    maps = []
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda _m, _i, output: maps.append(output.clone()))
    images, labels = next(batches.ordered(len(batches)))
    with torch.no_grad():
        model.eval()(images)
    peaks = maps[0].amax((2, 3))
    expected = torch.stack([peaks[labels == label].mean(0) for label in range(2)], 1)
    torch.testing.assert_close(next(iter(found[f"{own}:loudest"].values())), expected)


DECORATORS = (
    "import torch, math\n"
    "from permafrost.explain import saliency_method\n"
    "from permafrost.ranking import map_metric, network_criterion\n"
    "from permafrost.ranking import response_criterion, weights_criterion\n"
)
WRONG = {
    "a map metric of a wrong shape": (
        "@map_metric(higher_is_better=True)\ndef own(f, c): return f",
        r"metric 'own' returned shape \(3, 32, 32\), not \(3, 2\)",
    ),
    "weights that are no dict": (
        "@weights_criterion\ndef own(evidence): return 3",
        r"criterion 'custom\.own\d+:own' returned int, not a dict",
    ),
    "weights without a layer": (
        "@weights_criterion\ndef own(evidence): return {}",
        r"':?custom.*own' of layer 'features\.0' returned NoneType, not a Tensor \(3, 1\)",
    ),
    "weights by class": (
        "@weights_criterion\n"
        "def own(evidence): return {n: w.flatten(1) for n, w in evidence.weights.items()}",
        r"of layer 'features\.0' returned shape \(3, 27\), not \(3, 1\)",
    ),
    "weights of integers": (
        "@weights_criterion\n"
        "def own(e): return {n: torch.ones(len(w), 1, dtype=int) for n, w in e.weights.items()}",
        r"returned torch\.int64, not floating-point numbers",
    ),
    "responses over all images": (
        "@response_criterion\ndef own(a, g): return a.mean((0, 2, 3))",
        r"own' of layer 'features\.\d+' returned shape \(\d+,\), not \(\d+, \d+\)",
    ),
    "responses that are not finite": (
        "@response_criterion\ndef own(a, g): return a.mean((2, 3)) * math.nan",
        r"own' of layer 'features\.\d+' returned numbers that are not finite",
    ),
    "a network's scores without a layer": (
        "@network_criterion\ndef own(model, batches, classes): return {}",
        r"own' gave no class scores of layer 'features\.0'",
    ),
    "a network's scores without classes": (
        "@network_criterion\n"
        "def own(model, batches, classes): return {'features.0': torch.ones(3)}",
        r"own' of layer 'features\.0' returned shape \(3,\), not \(3, 2\)",
    ),
    "a network's scores as a list": (
        "@network_criterion\ndef own(model, batches, classes): return [1]",
        r"own' returned list, not a dict",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_scores_are_refused_in_one_line(write_own, shown, what):
    model, batches, normalization = shown
    text, message = WRONG[what]
    name = f"{write_own(DECORATORS + text)}:own"
    with pytest.raises(InputError, match=message) as caught:
        rank_network(model, batches, 2, normalization, name, ExplainConfig(steps=1), 0)
    assert "\n" not in str(caught.value)
    assert all(module.training for module in model.modules())


def test_an_own_saliency_method_explains(write_own, shown):
    model, batches, normalization = shown
    own = f"{write_own(OWN)}:brightness"
    images, labels = next(batches.ordered(8))
    assert torch.equal(saliency_maps(model, images, labels, own), images.mean(1))
    found = class_saliency(model, batches.ordered(3), 2, method=own)
    assert (found.maps.shape, found.completeness) == ((2, 32, 32), None)
    mean = images[labels == 1].mean((0, 1))
    expected = (mean - mean.min()) / (mean.max() - mean.min())
    torch.testing.assert_close(found.maps[1], expected)
    orders = rank_network(
        model, batches, 2, normalization, "mse", ExplainConfig(method=own, steps=1), 0
    )
    default = rank_network(model, batches, 2, normalization, "mse", ExplainConfig(steps=1), 0)
    assert any(not torch.equal(orders[layer], default[layer]) for layer in orders)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("images", r"returned shape \(8, 3, 32, 32\), not \(8, 32, 32\)"),
        ("None", r"returned NoneType, not a Tensor \(8, 32, 32\)"),
        ("images.mean(1).long()", r"returned torch\.int64, not floating-point numbers"),
        ("images.mean(1) * math.inf", "returned numbers that are not finite"),
    ],
)
def test_wrong_maps_are_refused_in_one_line(write_own, shown, result, message):
    model, batches, _ = shown
    text = f"@saliency_method\ndef own(model, images, targets): return {result}"
    own = f"{write_own(DECORATORS + text)}:own"
    with pytest.raises(InputError, match=f"saliency method '{own}' {message}") as caught:
        class_saliency(model, batches.ordered(8), 2, method=own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "kind", "registry"),
    [
        ("permafrost.ranking", "weights_criterion", "CRITERIA"),
        ("permafrost.explain", "saliency_method", "SALIENCY_METHODS"),
    ],
)
def test_a_new_file_of_the_package_is_found(tmp_path, package, kind, registry):
    (tmp_path / "new_one.py").write_text(f"from {package} import {kind}\n@{kind}\ndef new(x): 0\n")
    check = (
        f"import {package} as p\np.__path__.append({str(tmp_path)!r})\n"
        f"assert p.{registry}.find('new').__module__ == '{package}.new_one'"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_orders_of_equal_scores_go_by_index(write_own, shown):
    model, batches, normalization = shown
    text = "@response_criterion\ndef own(a, g): return torch.ones(a.shape[:2])"
    name = f"{write_own(DECORATORS + text)}:own"
    orders = rank_network(model, batches, 2, normalization, name, ExplainConfig(), 0)
    for order in orders.values():
        assert torch.equal(order, order_filters(torch.zeros(len(order), 1)))
