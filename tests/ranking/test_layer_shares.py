"""How much of each layer is kept, and what each weight counts."""

import pytest
import torch
from torch import nn

from permafrost.data import Batches, LabeledImages, Normalization
from permafrost.ranking.layer_shares import (
    circuit_sizes,
    depth_shares,
    mixed_shares,
    threshold_shares,
    uniform_shares,
)
from permafrost.ranking.weight_scores import permuted, weight_gradients

CPU = torch.device("cpu")


def test_uniform():
    assert uniform_shares({"a": 4, "b": 8}, 0.25) == {"a": 0.25, "b": 0.25}
    held = {"a": torch.arange(4) < 1, "b": torch.arange(8) < 7}  # True is free
    shares = uniform_shares({"a": 4, "b": 8}, 0.5, held)
    assert shares == pytest.approx({"a": 6 / 8 * 1 / 4, "b": 6 / 8 * 7 / 8})  # as many in all
    assert uniform_shares({"a": 4, "b": 8}, 0.9, held) == {"a": 1 / 4, "b": 7 / 8}


def test_one_threshold_for_all_layers():
    scores = {"a": torch.tensor([[9.0, 1.0], [8.0, 7.0]]), "b": torch.tensor([6.0, 0.5, 0.4, 0.3])}
    assert threshold_shares(scores, 0.5) == {"a": 0.75, "b": 0.25}
    assert threshold_shares(scores, 0.0) == {"a": 0, "b": 0}
    assert threshold_shares(scores, 1.0) == {"a": 1, "b": 1}


def test_what_is_held_is_not_chosen():
    """The part is of all weights; the free ones alone can make it up."""
    scores = {"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([2.0, 1.0])}
    free = {"a": torch.tensor([False, True]), "b": torch.tensor([True, True])}
    assert threshold_shares(scores, 0.5, free) == {"a": 0.5, "b": 0.5}
    assert threshold_shares(scores, 1.0, free) == {"a": 0.5, "b": 1.0}


def test_depth_takes_whole_layers_from_the_input_on():
    sizes = {"a": 10, "b": 20, "c": 70}
    assert depth_shares(sizes, 0.2) == {"a": 1.0, "b": 0.5, "c": 0.0}
    free = {"a": torch.zeros(10), "b": torch.ones(20), "c": torch.ones(70)}
    free = {name: values.bool() for name, values in free.items()}
    free["b"][:10] = False
    assert depth_shares(sizes, 0.2, free) == {"a": 0.0, "b": 0.5, "c": 1 / 7}
    assert depth_shares(sizes, 1.0) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_mix():
    assert mixed_shares({"a": 0.2}, {"a": 0.6}, 0.25) == {"a": pytest.approx(0.3)}


def test_sizes_of_a_circuit_take_what_is_wanted():
    widths, shares = {"a": 16, "b": 32, "c": 64}, {"a": 0.9, "b": 0.4, "c": 0.1}

    def new(sizes):
        return 3 * sizes["a"] + sizes["a"] * sizes["b"] + sizes["b"] * sizes["c"]

    total = new(widths)
    found = circuit_sizes(widths, shares, new, 0.3 * total)
    assert new(found) <= 0.3 * total < new({name: size + 2 for name, size in found.items()})
    roots = {name: (found[name] / widths[name]) ** 2 / shares[name] for name in widths}
    assert max(roots.values()) / min(roots.values()) < 1.3  # one factor, but for rounding
    assert circuit_sizes(widths, shares, new, 0) == {"a": 1, "b": 1, "c": 1}
    assert circuit_sizes(widths, shares, new, total) == widths


class TinyNetwork(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
        )  # fmt: skip


def test_gradients_are_of_batches_of_one_class():
    """Against one pass for each image of it, summed before the absolute value."""
    torch.manual_seed(0)
    model = TinyNetwork().double().eval()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    images = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8)
    norm = Normalization((0.5,) * 3, (0.25,) * 3)
    batches = Batches(LabeledImages(images, labels), norm, CPU)
    model = model.float()
    found = weight_gradients(model, batches, 3, seed=0)
    for name in ("0", "3"):
        weight = model.get_parameter(f"{name}.weight")
        expected = torch.zeros_like(weight)
        for label in range(3):
            total = torch.zeros_like(weight)
            for position in (labels == label).nonzero().flatten():
                logit = model(batches.at(position[None]))[0, label]
                total += torch.autograd.grad(logit, weight)[0]
            expected += total.abs()
        torch.testing.assert_close(found[name], expected)
    assert found.keys() == {"0", "3"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_chance_keeps_the_values():
    values = torch.arange(24.0).view(2, 3, 4)
    other = permuted(values, 0, "a")
    assert other.shape == values.shape
    assert not torch.equal(other, values)
    assert torch.equal(other.flatten().sort().values, values.flatten())
    assert torch.equal(other, permuted(values, 0, "a"))
    assert not torch.equal(other, permuted(values, 1, "a"))
    assert not torch.equal(other, permuted(values, 0, "b"))
