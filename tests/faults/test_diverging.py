"""Trainings that diverge say where, and nothing is made of networks that are not finite."""

import copy
from dataclasses import replace
from itertools import product

import torch

from edges import CPU, FLAT, MILD, refused, train
from permafrost.errors import NotFiniteError
from permafrost.evaluation.accuracy import accuracy
from permafrost.evaluation.drift import response_drift
from permafrost.explain import (
    SALIENCY_METHODS,
    class_saliency,
    conv_layers,
    start_image,
    visualize_filters,
)
from permafrost.ranking import known_criteria, order_filters
from permafrost.ranking.method import ExplainConfig, rank_network
from permafrost.strategies import INTEGRAL, STRATEGIES, Lesson, common_parameters
from permafrost.training import TrainingConfig, TrainingDiverged, cross_entropy

# The first training of those strategies that take two.
PHASE = {"packnet": ", retrain", "critical_layer": ", trial", "fragile_layer": ", trial"}
PHASE |= {"edges": ", retrain", "circuit": ", relearn", "circuit_lwf": ", relearn"}


def test_every_training_that_diverges_says_where(tally, rounds, make_network, make_sequence, learn):
    heads = ["shared", "multi", "expanding"][: rounds(1, 3)]
    optimizers = ["sgd", "adam", "adamw"][: rounds(2, 3)]
    with tally("diverging trainings") as fault:
        for name, head, optimizer in product(STRATEGIES, heads, optimizers):
            if head not in STRATEGIES[name].heads:
                continue
            with fault.trial((name, head, optimizer)):
                network = make_network(batch_norm=False)
                before = list(network.state_dict())
                # A head alone grows by about as much at every step: that takes long to overflow.
                config = TrainingConfig(epochs=99, lr=1e37, optimizer=optimizer, batch_size=2)
                task = "" if name == "joint" else f"^task 2{PHASE.get(name, '')}: "
                where = r"(at step \d of epoch \d+|after epoch \d+) with train\.lr=1e\+37$"
                with refused(TrainingDiverged, f"{task}.*{where}"):
                    learn(network, make_sequence(), name, config, head)
                assert list(network.state_dict()) == before  # the plain layers are back


def scaled(factor):
    def objective(model, batch):
        loss, logits, labels = cross_entropy(model, batch)
        return factor * loss, logits, labels

    return objective


def without_gradient(model, batch):
    """Return a finite loss whose gradient is not: the root's derivative at 0, times 0."""
    loss, logits, labels = cross_entropy(model, batch)
    return loss + (0 * model.head.bias).square().sqrt().sum(), logits, labels


class Overflowing:
    """An observer whose state overflows."""

    def __init__(self):
        self.tensors = {"seen": torch.zeros(2)}

    def before_step(self):
        pass

    def after_step(self):
        self.tensors["seen"] += torch.tensor([0.0, torch.inf])


# Loss finite at every step: network, config, further options, what is said.
UNSEEN = {
    "BatchNorm's statistics": ({}, {"lr": 1e10}, {}, "running_var is not finite after epoch 1"),
    "the last step's weights": ({}, {"lr": 1e15}, {}, r"\.weight is not finite after epoch 1"),
    "logits": ({}, {"lr": 1e10, "batch_size": 8}, {}, "logit is not finite after epoch 1"),
    "Adam's second moment": (
        {},
        {"optimizer": "adam"},
        {"objective": scaled(1e25)},
        "exp_avg_sq is not finite after epoch 1",
    ),
    "a gradient": (
        {},
        {"batch_size": 8},
        {"objective": without_gradient},
        r"head\.bias is not finite after epoch 1",
    ),
    "a gradient before the last step": (
        {"batch_norm": False},
        {},
        {"objective": without_gradient},
        "the loss is nan at step 2 of epoch 1",
    ),
    "an observer": ({}, {}, {"observer": Overflowing()}, "observer/seen is not finite"),
    "one step without BatchNorm": (
        {"batch_norm": False},
        {"lr": 1e20, "batch_size": 8},
        {},
        "logit is not finite after epoch 1",
    ),
}


def test_divergence_that_no_loss_shows(tally, view, batches):
    with tally("divergence that no loss shows") as fault:
        for what, (options, settings, more, words) in UNSEEN.items():
            with fault.trial(what):
                model, stored = view(**options), []
                config = replace(MILD, **settings)
                with refused(
                    TrainingDiverged, f"{words}.* with train.lr={config.lr}".replace("+", r"\+")
                ):
                    train(
                        model,
                        batches,
                        config,
                        measure=lambda model=model: {"accuracy": accuracy(model, batches, 2)},
                        on_epoch=stored.append,
                        **more,
                    )
                assert not stored  # no checkpoint to go on from


def test_what_a_strategy_keeps_is_finite(
    tally, make_network, make_sequence, make_strategy, keep, learn
):
    """Importances, old answers and layers' changes of a network whose weights are finite."""
    with tally("knowledge that is not finite") as fault:
        for name in ("ewc", "si", "lwf", "freeze_ewc", "freeze_lwf"):
            with fault.trial(name):
                network = make_network(batch_norm=False)
                integral = {
                    f"{INTEGRAL}{n}": torch.full_like(p, torch.inf)
                    for n, p in common_parameters(network, "shared", 1).items()
                }
                for parameter in network.features.parameters():
                    parameter.data.mul_(1e12)
                lesson = Lesson(
                    network, 0, make_sequence(), MILD, "shared", 0, CPU, keep, integral,
                    make_network(batch_norm=False).state_dict(),
                )  # fmt: skip
                with refused(NotFiniteError, "importance of features|answers are not finite"):
                    STRATEGIES[name].knowledge(lesson)
        for name in ("critical_layer", "fragile_layer"):
            with fault.trial(name):
                network, sequence = make_network(), make_sequence()
                strategy = make_strategy(name, "shared")
                lesson = Lesson(network, 1, sequence, MILD, "shared", 0, CPU, keep)
                lesson = replace(lesson, start=copy.deepcopy(network.state_dict()))
                network.features[0].bias.data[0] = -torch.inf
                with refused(NotFiniteError, r"response of layer features\.0 "):
                    strategy.after_phase(lesson, strategy.phases(lesson)[0], None)


def spoil(place, value):
    def change(network):
        values = network.state_dict()[place]
        values[(0,) * values.ndim] = value

    return change


SPOILED = {
    "first weight nan": spoil("features.0.weight", torch.nan),
    "first weight inf": spoil("features.0.weight", torch.inf),
    "last weight nan": spoil("features.25.weight", torch.nan),
    "gamma nan": spoil("features.1.weight", torch.nan),
    "variance nan": spoil("features.1.running_var", torch.nan),
    "head nan": spoil("heads.0.weight", torch.nan),
    # The ReLU hides it from the logits.
    "bias -inf": spoil("features.0.bias", -torch.inf),
}


def test_no_map_picture_or_ranking_is_made_of_nan(tally, rounds, make_network, batches):
    start = start_image(32, FLAT.mean, FLAT.std, seed=0)
    spoiled = list(SPOILED.items())[: rounds(4, 7)]
    if SPOILED["bias -inf"] not in dict(spoiled).values():
        spoiled.append(("bias -inf", SPOILED["bias -inf"]))
    with tally("networks that are not finite") as fault:
        for what, change in spoiled:
            network = make_network()
            change(network)
            model = network.view("shared", 0, 1)
            for method in SALIENCY_METHODS:
                if what == "bias -inf" and method not in ("fullgrad", "smooth_fullgrad"):
                    continue  # its maps do not look at biases
                said = "maps" if what == "bias -inf" else "logits"
                with (
                    fault.trial((what, method)),
                    refused(NotFiniteError, f"{said} are not all finite"),
                ):
                    class_saliency(model, batches.ordered(8), 2, method=method)
            for criterion in known_criteria():
                with fault.trial((what, criterion)), refused(NotFiniteError, "is not finite"):
                    rank_network(model, batches, 2, FLAT, criterion, ExplainConfig(steps=1), 0)
            with fault.trial((what, "accuracy, drift")):
                if what != "bias -inf":
                    with refused(NotFiniteError, "logit"):
                        accuracy(model, batches, 2)
                if not what.startswith(("gamma", "head", "variance")):
                    with refused(NotFiniteError, "response of layer"):
                        healthy = make_network().view("shared", 0, 1)
                        response_drift(healthy, model, batches, list(conv_layers(model)))
        for what, layer in (("first weight nan", 0), ("last weight nan", 25), ("gamma nan", 25)):
            with (
                fault.trial((what, "pictures")),
                refused(NotFiniteError, f"layer 'features.{layer}'"),
            ):
                network = make_network()
                SPOILED[what](network)
                model = network.view("shared", 0, 1)
                visualize_filters(model, f"features.{layer}", start=start, steps=1)
        with fault.trial("scores"), refused(NotFiniteError, "scores are not finite"):
            order_filters(torch.tensor([[0.0], [torch.nan]]))
