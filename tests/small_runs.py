"""Small runs: parameters, inputs and specifications of trainings that take a moment."""

import json

import pytest
import torch

from permafrost.evaluation import Accuracy
from permafrost.experiment import (
    RunInputs,
    knowledge_name,
    new_network,
    run_settings,
    train_run,
)
from permafrost.first_weights import FirstWeights
from permafrost.params import Params
from permafrost.plan import grids, sweep_runs
from permafrost.ranking.method import frozen_masks
from permafrost.runs.knowledge import first_lesson
from permafrost.runs.outcome import Outcome, accuracy_facts
from permafrost.runs.spec import RunSpec
from permafrost.runs.store import RunRequest
from permafrost.strategies import STRATEGIES, Progress, common_parameters

CPU = torch.device("cpu")


def make_params(**sections):
    values = {
        "seeds": [0],
        "split": {"classes_per_task": 2},
        "model": {"arch": "vgg11", "width": 0.05},
        "train": {"epochs": 2, "lr": 0.01, "batch_size": 4},
    }
    for name, section in sections.items():
        old = values.get(name)
        values[name] = {**old, **section} if isinstance(old, dict) else section
    return Params.model_validate(values)


def unread():
    raise AssertionError("what stage consolidate wrote was read")


def make_knowledge(params, sequence, network):
    """Return what stage consolidate writes."""
    watched = common_parameters(network, "shared", 1)
    integral = {name: torch.full_like(value, 0.01) for name, value in watched.items()}
    settings = run_settings(params, FirstWeights(), CPU)
    lesson = first_lesson(settings, 0, sequence, network, integral, CPU)
    made = {knowledge_name(strategy): strategy.knowledge for strategy in STRATEGIES.values()}
    return {
        f"{name}/{entry}": value.contiguous()
        for name, make in made.items()
        if make is not None
        for entry, value in make(lesson).items()
    }


def make_orders(params=None):
    network = new_network(params or make_params(), 0)
    return {
        f"features.{index}": torch.arange(layer.out_channels).flip(0)
        for index, layer in enumerate(network.features)
        if isinstance(layer, torch.nn.Conv2d)
    }


MASKS = frozen_masks(make_orders(), 0.5)
FREEZE = RunSpec("freeze", 0, "shared", "mse", 0.5)
FINETUNE = RunSpec("finetune", 0, "shared")
EWC = RunSpec("ewc", 0, "shared", hyper=(("strength", 3.0),))
LWF = RunSpec("lwf", 0, "shared", hyper=(("temperature", 2.0), ("weight", 0.5)))
REPLAY = RunSpec("replay", 0, "shared")


def make_joint(seed, head, passes):
    return RunSpec("joint", seed, head, hyper=(("passes", passes),))


def chosen_for(params):
    """Return the first entry of what is tried, as stage tune writes it."""
    first = {name: grid[0] for name, grid in grids(params).items()}
    return dict.fromkeys(params.sweep.heads, first)


def as_json(record):
    return json.loads(json.dumps(record))


def never(progress, on_epoch):
    raise AssertionError("trained again")


REQUEST = RunRequest("cell", "a cell", {"seed": 0}, {"seed": 0}, (), {"strategy": "none"})


FILTERS = {"filters": {"a": 4, "b": 6}, "frozen": {"b": 3}}


def facts(correct=1):
    """Return what one task of two images, learned by nothing, would be measured as."""
    rows = [[Accuracy((0,), (2,))], [Accuracy((correct,), (2,))]]
    return accuracy_facts(Progress(1, rows)) | {"memory_bytes": 0} | FILTERS


def trivial(progress, on_epoch):
    return Outcome(facts(), {"weight": torch.ones(3)}, 1.5, {"kept": torch.zeros(2)})


def cell_of(strategy, head="shared"):
    """Return a strategy's run as the sweep has it."""
    params = make_params(sweep={"strategies": [strategy], "heads": [head]})
    return sweep_runs(params, chosen_for(params))[0]


def make_inputs(params, sequence):
    first = new_network(params, 0).state_dict()
    return RunInputs(sequence, "tasks", first, "first", unread)


class Asked(Exception):
    """Carries the key of what was asked for."""


class Catcher:
    def obtain(self, request, train, on_epoch):
        raise Asked(request.key)


def key_of(spec, inputs, masks=MASKS, **sections):
    with pytest.raises(Asked) as caught:
        train_run(Catcher(), make_params(**sections), spec, inputs, masks, CPU)
    return str(caught.value)
