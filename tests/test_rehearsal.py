"""What check says of a network that cannot serve what the parameters ask of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from permafrost.data import LabeledImages, Normalization, Task, TaskSequence
from permafrost.errors import InputError
from permafrost.models import NETWORKS
from permafrost.params import Params
from permafrost.rehearsal import rehearse
from permafrost.strategies import STRATEGIES

EVERY = sorted(STRATEGIES)


class Gated(nn.Module):
    """A gate and a norm of each image's own, as in ConvNeXt and EfficientNet."""

    def __init__(self):
        super().__init__()
        self.first, self.gate = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.norm = nn.GroupNorm(1, 4)

    def forward(self, images):
        maps = self.first(images)
        return F.silu(self.norm(maps * self.gate(maps).sigmoid()))


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())


def single():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))


@pytest.fixture(autouse=True)
def own(monkeypatch):
    list(NETWORKS)
    for make in (Gated, plain, single):
        monkeypatch.setitem(NETWORKS._things, make.__name__, make)


@pytest.fixture
def check(make_sequence):
    """Return a function that rehearses parameters on tasks of two classes."""

    def check(arch, strategies=("finetune",), metrics=("mse",), batch_size=64, **model):
        params = Params(
            seeds=[0],
            split={"classes_per_task": 2},
            model={"arch": arch, "width": 1.0} | model,
            train={"batch_size": batch_size},
            rank={"metrics": [*metrics]},
            sweep={"strategies": [*strategies], "metrics": [metrics[0]]},
        )
        rehearse(params, make_sequence())

    return check


def test_a_network_that_serves_everything(check):
    metrics = ["mse", "random", "magnitude", "bn_gamma", "activation", "taylor", "fisher"]
    before = torch.get_rng_state()
    check("plain", EVERY, [*metrics, "relevance"])
    assert torch.equal(torch.get_rng_state(), before)


CANNOT = dict.fromkeys(["packnet", "edges"], r".*norm\.weight.*GroupNorm")
CANNOT |= dict.fromkeys(
    ["circuit", "circuit_lwf", "soft", "soft_lwf"], "channels are not followed through sigmoid"
)
CANNOT["rnf"] = "'relevance' cannot explain this network"


@pytest.mark.parametrize(("name", "why"), CANNOT.items())
def test_a_strategy_that_a_network_cannot_serve_is_named(check, name, why):
    message = rf"^sweep\.strategies: {name} cannot serve Gated: {why}"
    with pytest.raises(InputError, match=message):
        check("Gated", [name])


def test_the_others_serve_any_network(check):
    check("Gated", [name for name in EVERY if name not in CANNOT], ["mse", "magnitude", "taylor"])


@pytest.mark.parametrize("metric", ["relevance", "bn_gamma"])
def test_a_criterion_that_a_network_cannot_serve_is_named(check, metric):
    with pytest.raises(InputError, match=rf"^rank\.metrics: {metric} cannot serve Gated: "):
        check("Gated", metrics=["mse", metric])


@pytest.mark.parametrize("sizes", [[3, 2], [2, 2, 2]], ids=["of unequal size", "three"])
def test_tasks_of_several_data_sets(sizes):
    tasks = [{"classes": [f"{t} {c}" for c in range(size)]} for t, size in enumerate(sizes)]
    params = Params.model_validate(
        {
            "split": {"tasks": tasks},
            "model": {"arch": "plain", "width": 1.0, "head": "multi"},
            "sweep": {"strategies": ["finetune", "soft"], "heads": ["multi"], "metrics": ["mse"]},
        }
    )
    images = LabeledImages(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1] * 2))
    made = [Task(tuple(task["classes"]), images, images, images) for task in tasks]
    rehearse(params, TaskSequence(tuple(made), Normalization((0.5,) * 3, (0.5,) * 3)))


def test_a_last_batch_of_one_image_is_refused_where_it_cannot_be_learned_from(check):
    check("single", batch_size=4)  # of eight images
    with pytest.raises(InputError, match=r"^train\.batch_size: with 7 a task's last batch is one"):
        check("single", batch_size=7)
    check("plain", batch_size=7)


def test_choices_that_a_network_has_not_are_told(check):
    with pytest.raises(InputError, match=r"^model\.width: plain cannot vary it; allowed: 1$"):
        check("plain", width=0.5)


def test_nothing_is_tried_of_the_packages_own_network(check, monkeypatch):
    monkeypatch.setattr("permafrost.rehearsal._Rehearsal.of", None)
    check("vgg11", EVERY, width=0.05)
