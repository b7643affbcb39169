"""Numbers at their edges: trainings that diverge, networks and data that hold next to nothing."""

import copy
import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from torch import nn
from typer.testing import CliRunner

from permafrost.artifacts import load_json
from permafrost.cli import app
from permafrost.data import Batches, ImageDataset, LabeledImages, Normalization, split_tasks
from permafrost.errors import NotFiniteError
from permafrost.evaluation import accuracy, response_drift
from permafrost.explain import (
    SALIENCY_METHODS,
    class_saliency,
    conv_layers,
    heat_maps,
    start_image,
    visualize_filters,
)
from permafrost.freezing import frozen_filters
from permafrost.models import ARCHITECTURES
from permafrost.ranking import (
    AGGREGATES,
    METRICS,
    evaluate_metric,
    frozen_mask,
    known_criteria,
    order_filters,
)
from permafrost.ranking.method import ExplainConfig, rank_network
from permafrost.stages import cell_pool
from permafrost.strategies import (
    INTEGRAL,
    STRATEGIES,
    Learner,
    Lesson,
    PackNet,
    Progress,
    common_parameters,
)
from permafrost.tables import accuracy_table
from permafrost.training import TrainingConfig, TrainingDiverged, cross_entropy, fit
from project import REPOSITORY, SEED_STAGES, TINY, Project, command_of, stages_run

CPU = torch.device("cpu")
MILD = TrainingConfig(epochs=1, lr=0.01, batch_size=4)
FLAT = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture
def view(make_network):
    """Return a builder of classifiers of the first task."""
    return lambda **options: make_network(**options).view("shared", 0, 1)


@pytest.fixture
def batches(make_sequence):
    """Return eight images of two classes."""
    sequence = make_sequence()
    return Batches(sequence.tasks[0].train, sequence.normalization, CPU)


@pytest.fixture
def learn(make_strategy, learn_first, keep):
    """Return a function that learns the second task, or all jointly; returns the progress."""

    def run(network, sequence, name, config, head="shared", first=MILD, masks=None):
        strategy = make_strategy(name, head, masks) if masks else make_strategy(name, head)
        learner = Learner(sequence, config, head=head, seed=0, device=CPU, keep=keep)
        progress = Progress(0, [learner.measure(network, 0)])
        if strategy.continues:
            progress.memory = learn_first(network, sequence, first, strategy)
            progress.rows.append(learner.measure(network, 1))
            progress.learned = 1
        strategy.learn(learner, network, progress)
        return progress

    return run


def train(model, batches, config, **options):
    return fit(model, batches, config, generator=torch.Generator().manual_seed(0), **options)


def all_finite(module):
    return all(value.isfinite().all() for value in module.state_dict().values())


@contextmanager
def refused(error, pattern):
    """Within the block the error must be raised, in one line that matches the pattern."""
    try:
        yield
    except error as caught:
        line = str(caught)
    else:  # an AssertionError, which a trial counts; pytest.raises would end the test
        raise AssertionError("nothing was refused")
    assert "\n" not in line
    assert re.search(pattern, line), line


# Trainings that diverge.

# The first training of those strategies that take two.
PHASE = {"packnet": ", retrain", "critical_layer": ", trial", "fragile_layer": ", trial"}


def test_every_training_that_diverges_says_where(tally, rounds, make_network, make_sequence, learn):
    heads = ["shared", "multi", "expanding"][: rounds(1, 3)]
    optimizers = ["sgd", "adam", "adamw"][: rounds(2, 3)]
    with tally("diverging trainings") as fault:
        for name, head, optimizer in product(STRATEGIES, heads, optimizers):
            if (name, head) == ("packnet", "expanding"):
                continue  # it needs to know the task
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


# Networks with next to nothing in them.


def masks_of(pct):
    def choose(lesson, frozen=None):
        network = getattr(lesson, "network", lesson)
        return {
            name: frozen_mask(torch.arange(layer.out_channels).flip(0), pct)
            for name, layer in conv_layers(network).items()
        }

    return choose


def test_a_network_of_single_filters(tally, rounds, make_network, make_sequence, learn):
    """Explained, ranked, frozen, trained and measured."""
    sequence, settings = make_sequence(), ExplainConfig(steps=1)
    batches = Batches(sequence.tasks[0].train, sequence.normalization, CPU)
    archs = list(ARCHITECTURES)[: rounds(1, 4)]
    with tally("narrow networks") as fault:
        for arch, batch_norm in product(archs, (True, False)):
            model = make_network(arch, 1e-3, batch_norm).view("shared", 0, 1)
            for method in SALIENCY_METHODS:
                with fault.trial((arch, batch_norm, method)):
                    found = class_saliency(model, batches.ordered(8), 2, method=method)
                    assert found.maps.shape == (2, 32, 32)
                    assert 0 <= found.maps.min() <= found.maps.max() <= 1
            for criterion, aggregate in product(known_criteria(), AGGREGATES[:: rounds(3, 1)]):
                if criterion == "bn_gamma" and not batch_norm:
                    continue
                with fault.trial((arch, batch_norm, criterion, aggregate)):
                    config = replace(settings, aggregate=aggregate)
                    orders = rank_network(
                        model, batches, 2, sequence.normalization, criterion, config, 0
                    )
                    assert {tuple(order.tolist()) for order in orders.values()} == {(0,)}
            for name, precision in product(STRATEGIES, ("float32", "bfloat16")[: rounds(1, 2)]):
                with fault.trial((arch, batch_norm, name, precision)):
                    network = make_network(arch, 1e-3, batch_norm)
                    config = replace(MILD, precision=precision)
                    progress = learn(network, sequence, name, config, masks=masks_of(0.5))
                    assert all_finite(network)
                    assert all(0 <= a.overall <= 1 for a in progress.rows[-1])


def test_shares_of_frozen_filters(tally, rounds, make_network, make_sequence, learn, same_bits):
    """None, a narrow layer wholly and wide ones not, all: what is frozen keeps its bits."""
    precisions = ("float32", "bfloat16")
    cases = product(
        ("freeze", "freeze_ewc", "freeze_lwf"),
        (0.0, 0.1, 0.5, 1.0),
        ("sgd", "adamw"),
        precisions[: rounds(1, 2)],
    )
    first = replace(MILD, epochs=0)  # measured against the initial weights
    with tally("shares of frozen filters") as fault:
        for name, pct, optimizer, precision in cases:
            with fault.trial((name, pct, optimizer, precision)):
                network = make_network(width=0.008)  # 1, 1, 2, 2, 4, 4, 4, 4 filters
                before = copy.deepcopy(network.state_dict())
                config = replace(MILD, optimizer=optimizer, precision=precision, weight_decay=0.1)
                masks = masks_of(pct)
                learn(network, make_sequence(), name, config, first=first, masks=masks)
                for layer, mask in masks(network).items():
                    kept, now = before[f"{layer}.weight"], network.state_dict()[f"{layer}.weight"]
                    assert torch.equal(kept[mask], now[mask])
                    live = [
                        not torch.equal(a, b) for a, b in zip(kept[~mask], now[~mask], strict=True)
                    ]
                    assert all(live), layer  # also below a layer that is frozen as a whole
                counts = [int(mask.sum()) for mask in masks(network, 1).values()]
                sizes = [layer.out_channels for layer in conv_layers(network).values()]
                assert sizes == [1, 1, 2, 2, 4, 4, 4, 4]
                assert (
                    counts
                    == {
                        0.0: [0] * 8,
                        0.1: [0] * 8,  # rounded, half up: no layer has a tenth of a filter
                        0.5: [1, 1, 1, 1, 2, 2, 2, 2],
                        1.0: sizes,
                    }[pct]
                )


def test_all_or_nothing_of_the_other_methods(tally, make_network, make_sequence, keep, same_bits):
    """Every weight given away, or none; every layer frozen."""
    with tally("all or nothing frozen") as fault:
        for prune, head in product((0.0, 1.0), ("shared", "multi")):
            with fault.trial(("packnet", prune, head)):
                network, sequence = make_network(), make_sequence()
                learner = Learner(sequence, MILD, head=head, seed=0, device=CPU, keep=keep)
                before = copy.deepcopy(network.state_dict())
                progress = Progress(1, [])
                learner.learn_task(network, PackNet(head, prune), progress)
                weight = "features.0.weight"
                after = network.state_dict()[weight]
                answering = PackNet(head, prune).network_for(network, 0, progress.memory)
                old = answering.state_dict()[weight]
                if prune == 0:  # retrained, and nothing is left for the second task
                    assert torch.equal(old, after)
                    assert not torch.equal(after, before[weight])
                else:  # nothing is left of the first task, and no gradient passes layers of zeros
                    assert not old.any()
                    assert not after.any()
        for name, strategy in STRATEGIES.items():
            if "layers" not in strategy.hyper:
                continue
            for share in (0.0, 1.0):
                with fault.trial((name, share)):
                    network, sequence = make_network(), make_sequence()
                    learner = Learner(sequence, MILD, head="shared", seed=0, device=CPU, keep=keep)
                    before = copy.deepcopy(network.features.state_dict())
                    learner.learn_task(network, strategy("shared", layers=share), Progress(1, []))
                    assert same_bits(before, network.features.state_dict()) == (share == 1)


def test_gradients_pass_a_layer_that_is_frozen_as_a_whole(tally, view, batches):
    with tally("layers frozen as a whole") as fault:
        modes, precisions = ("full", "affine", "none"), ("float32", "bfloat16")
        for width, mode, precision in product((0.008, 0.05), modes, precisions):
            with fault.trial((width, mode, precision)):
                model = view(width=width)
                before = copy.deepcopy(model.state_dict())
                layers = conv_layers(model)
                middle = "features.8"
                mask = torch.ones(layers[middle].out_channels, dtype=torch.bool)
                with frozen_filters(model, {middle: mask}, mode):
                    assert not list(model.get_submodule(middle).parameters())
                    train(model, batches, replace(MILD, precision=precision))
                for name in layers:
                    moved = not torch.equal(before[f"{name}.weight"], layers[name].weight)
                    assert moved == (name != middle), name


@pytest.mark.parametrize("batch_norm", ["full", "affine", "none"])
def test_dead_filters_can_be_frozen(tally, make_network, batches, batch_norm):
    with tally(f"dead filters, batch_norm {batch_norm}") as fault:
        for precision, optimizer in product(("float32", "bfloat16"), ("sgd", "adam")):
            with fault.trial((precision, optimizer)):
                network = make_network()
                for layer in conv_layers(network).values():
                    layer.weight.data[::2] = 0
                masks = masks_of(0.0)(network)
                for mask in masks.values():
                    mask[::2] = True
                with frozen_filters(network, masks, batch_norm):
                    config = replace(MILD, epochs=2, precision=precision, optimizer=optimizer)
                    train(network.view("shared", 0, 1), batches, config)
                assert all_finite(network)
                for layer in conv_layers(network).values():
                    assert not layer.weight[::2].any()
                    assert layer.weight[1::2].any()


def test_pictures_of_dead_filters(tally, make_network):
    """Moved by weight decay alone; ranked like any others."""
    start = start_image(32, FLAT.mean, FLAT.std, seed=0)
    with tally("pictures of dead filters") as fault:
        for layer, decay in product((0, 4, 25), (0.0, 1e-6)):
            with fault.trial((layer, decay)):
                model = make_network().view("shared", 0, 1)
                model.features[layer].weight.data[1] = 0
                pictures = visualize_filters(
                    model, f"features.{layer}", start=start, steps=3, weight_decay=decay
                )
                assert torch.equal(pictures[1], start) == (decay == 0)
                assert not torch.equal(pictures[0], pictures[1])
                maps = heat_maps(pictures, start)
                for name, metric in METRICS.items():
                    assert evaluate_metric(metric, maps, maps[:2]).isfinite().all(), name


def test_the_optimizers_extremes(tally, rounds, view, batches, same_bits):
    """A rate of 0 and no epochs move no weight; the greatest decay and momentum end or diverge."""
    with tally("extremes of the optimizers") as fault:
        for optimizer, settings in product(("sgd", "adam", "adamw"), ({"lr": 0.0}, {"epochs": 0})):
            with fault.trial((optimizer, settings)):
                model = view()
                before = {n: p.detach().clone() for n, p in model.named_parameters()}
                rows = train(model, batches, replace(MILD, optimizer=optimizer, **settings))
                assert same_bits(before, dict(model.named_parameters()))
                assert len(rows) == settings.get("epochs", 1)
        diverged = []
        cases = product(("sgd", "adam", "adamw"), (0.0, 0.999), (0.0, 10.0), (1e-30, 10.0))
        for optimizer, momentum, decay, lr in cases:
            with fault.trial((optimizer, momentum, decay, lr)):
                model = view(batch_norm=False)
                config = TrainingConfig(rounds(3, 30), optimizer, lr, momentum, decay, batch_size=4)
                try:
                    rows = train(
                        model,
                        batches,
                        config,
                        measure=lambda m=model: vars(accuracy(m, batches, 2)),
                    )
                except TrainingDiverged:
                    diverged.append((optimizer, decay, lr))
                else:
                    assert all_finite(model)
                    assert len(rows) == config.epochs
        with fault.trial("which diverged"):
            assert {lr for _, _, lr in diverged} == {10.0}
            assert ("sgd", 10.0, 10.0) in diverged  # weights grow hundredfold at every step


# Data with next to nothing in them.


def test_one_class_for_each_task(tally, make_network, make_sequence, learn, same_bits):
    sequence = make_sequence(classes=1)
    batches = Batches(sequence.tasks[0].train, FLAT, CPU)
    with tally("one class") as fault:
        for name, head in product(STRATEGIES, ("shared", "multi")):
            with fault.trial((name, head)):
                network = make_network(classes=1)
                progress = learn(network, sequence, name, MILD, head)
                assert [entry.overall for entry in progress.rows[-1]] == [1, 1]
                if name in ("finetune", "freeze", "joint", "linear_probe"):
                    # One logit cannot be wrong: nothing is lost, and nothing learned.
                    assert {row["train_loss"] for row in progress.history} == {0.0}
                    assert same_bits(
                        dict(network.named_parameters()),
                        dict(make_network(classes=1).named_parameters()),
                    )
        model = make_network(classes=1).view("shared", 0, 1)
        for method in SALIENCY_METHODS:
            with fault.trial(method):
                maps = class_saliency(model, batches.ordered(3), 1, method=method).maps
                assert maps.shape == (1, 32, 32)
                if method != "gradcam":  # it is zero where nothing speaks for the logit
                    assert (maps.min(), maps.max()) == (0, 1)
        for criterion in known_criteria():
            with fault.trial(criterion):
                orders = [
                    rank_network(
                        model, batches, 1, FLAT, criterion, ExplainConfig(steps=1, aggregate=a), 0
                    )
                    for a in AGGREGATES
                ]
                assert all(same_bits(orders[0], other) for other in orders)


def changed(sequence, change):
    """Return the sequence with every set of images changed."""
    return replace(
        sequence,
        tasks=tuple(
            replace(task, **{part: change(getattr(task, part)) for part in ("train", "test")})
            for task in sequence.tasks
        ),
    )


def of_class_zero(images, labels, value):
    return torch.where((labels == 0)[:, None, None, None], value, images)


DEGENERATE = {
    "identical images": lambda d: replace(d, images=d.images[:1].repeat(len(d.labels), 1, 1, 1)),
    "a black class": lambda d: replace(d, images=of_class_zero(d.images, d.labels, 0)),
    "a white class": lambda d: replace(d, images=of_class_zero(d.images, d.labels, 255)),
    "all black": lambda d: replace(d, images=torch.zeros_like(d.images)),
    "one image of a class": lambda d: LabeledImages(d.images[-3:], torch.tensor([0, 1, 1])),
    "one image": lambda d: LabeledImages(d.images[:1], d.labels[:1]),
}


def test_images_that_hold_little(tally, rounds, make_network, make_sequence, learn):
    names = ["freeze", "ewc", "packnet", "replay", "joint", *STRATEGIES][: rounds(5, 99)]
    criteria = ["mse", "spearman", "relevance", "fisher", *known_criteria()][: rounds(4, 99)]
    precisions = ("float32", "bfloat16")[: rounds(1, 2)]
    with tally("degenerate images") as fault:
        for what, change in DEGENERATE.items():
            sequence = changed(make_sequence(), change)
            batches = Batches(sequence.tasks[0].train, sequence.normalization, CPU)
            for name, batch_norm, precision in product(
                dict.fromkeys(names), (True, False), precisions
            ):
                with fault.trial((what, name, batch_norm, precision)):
                    network = make_network(batch_norm=batch_norm)
                    config = replace(MILD, precision=precision)
                    progress = learn(network, sequence, name, config)
                    assert all_finite(network)
                    found = [entry.overall for entry in progress.rows[-1]]
                    if what in ("identical images", "all black"):  # nothing tells the classes apart
                        assert found == [0.5, 0.5]
            model = make_network().view("shared", 0, 1)
            classes = int(batches.labels.max()) + 1
            for method in SALIENCY_METHODS:
                with fault.trial((what, method)):
                    maps = class_saliency(model, batches.ordered(2), classes, method=method).maps
                    assert 0 <= maps.min() <= maps.max() <= 1
                    if what == "identical images":
                        again = class_saliency(model, batches.ordered(1), classes, method=method)
                        torch.testing.assert_close(again.maps, maps, rtol=1e-3, atol=1e-4)
            for criterion in dict.fromkeys(criteria):
                with fault.trial((what, criterion)):
                    orders = rank_network(
                        model, batches, classes, FLAT, criterion, ExplainConfig(steps=1), 0
                    )
                    for name, layer in conv_layers(model).items():
                        assert sorted(orders[name].tolist()) == list(range(layer.out_channels))


def test_sizes_of_data_sets_and_batches(tally, rounds, view, make_sequence, half_masks):
    """A last batch of one image, batches of one, and fewer images than a batch has."""
    with tally("sizes of data sets and batches") as fault:
        for count, size in product((1, 2, 5, 9), (1, 2, 4, 8, 64)):
            for batch_norm, frozen, precision in product(
                (True, False), (False, True), ("float32", "bfloat16")[: rounds(1, 2)]
            ):
                with fault.trial((count, size, batch_norm, frozen, precision)):
                    task = make_sequence(train=5).tasks[0].train
                    data = LabeledImages(task.images[:count], task.labels[:count])
                    model, seen = view(batch_norm=batch_norm), []

                    def objective(model, batch, seen=seen):
                        seen.append(len(batch.labels))
                        return cross_entropy(model, batch)

                    masks = half_masks(model) if frozen else {}
                    config = replace(MILD, batch_size=size, precision=precision)
                    with frozen_filters(model, masks):
                        train(model, Batches(data, FLAT, CPU), config, objective=objective)
                    full, rest = divmod(count, size)
                    assert seen == [size] * full + [rest] * (rest > 0)  # no image is left out
                    assert all_finite(model)
        nothing = LabeledImages(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0).long())
        for use in (
            lambda b: train(view(), b, MILD),
            lambda b: accuracy(view(), b, 2),
            lambda b: class_saliency(view(), b.ordered(4), 2),
        ):
            with fault.trial("no images"), refused(ValueError, "no images|without images"):
                use(Batches(nothing, FLAT, CPU))


def small_classifier(batch_norm=True):
    """Return a network for images of any size."""
    torch.manual_seed(0)
    norm = [nn.BatchNorm2d(4)] if batch_norm else []
    layers = [nn.Conv2d(3, 4, 3, padding=1), *norm, nn.ReLU(), nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))


def noise(count, side):
    generator = torch.Generator().manual_seed(side)
    images = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return LabeledImages(images, torch.arange(count) % 2)


def test_sizes_of_images(tally, rounds, view, make_network):
    with tally("sizes of images") as fault:
        for side in (1, 2, 8, 31, 33)[:: rounds(1, 1)]:
            data = Batches(noise(4, side), FLAT, CPU)
            for method in SALIENCY_METHODS:
                with fault.trial((side, method)):
                    maps = class_saliency(
                        small_classifier(), data.ordered(3), 2, method=method
                    ).maps
                    assert maps.shape == (2, side, side)
                    assert maps.isfinite().all()
                    if side == 1:  # a single position is a constant map
                        assert not maps.any()
            start = start_image(side, FLAT.mean, FLAT.std, seed=0)
            pictures = visualize_filters(small_classifier(), "0", start=start, steps=2)
            maps = heat_maps(pictures, start)
            for name, metric in METRICS.items():
                with fault.trial((side, name)):
                    assert evaluate_metric(metric, maps, maps[:2]).isfinite().all()
            for padding, flip in product((0, 4, 64), (False, True)):
                with fault.trial((side, padding, flip)):
                    model = small_classifier()
                    train(model, data, replace(MILD, padding=padding, flip=flip))
                    assert all_finite(model)
        for side in (1, 8, 16, 31):
            # Five poolings halve the images: nothing is left of those below 32 pixels.
            with (
                fault.trial((side, "vgg")),
                refused((RuntimeError, ValueError), "too small|1 value"),
            ):
                train(view(), Batches(noise(4, side), FLAT, CPU), MILD)
        for side in (32, 33, 63):
            with fault.trial((side, "vgg")):
                model = view()
                train(model, Batches(noise(5, side), FLAT, CPU), MILD)
                assert all_finite(model)
        with fault.trial("one value per channel"), refused(ValueError, "more than 1 value"):
            train(small_classifier(), Batches(noise(3, 1), FLAT, CPU), replace(MILD, batch_size=2))
        with fault.trial("one value per channel, without BatchNorm"):
            model = small_classifier(batch_norm=False)
            train(model, Batches(noise(3, 1), FLAT, CPU), replace(MILD, batch_size=2))


def test_splits_that_leave_little(tally):
    """One test image, no validation images, colours that never change."""
    with tally("splits that leave little") as fault:
        for images, colour in ((3, None), (3, 0), (3, 255)):
            with fault.trial((images, colour)):
                data = noise(4 * images, 32)
                labels = torch.arange(4).repeat_interleave(images)
                pixels = data.images if colour is None else torch.full_like(data.images, colour)
                dataset = ImageDataset(tuple("abcd"), LabeledImages(pixels, labels), None)
                sequence = split_tasks(
                    dataset, classes_per_task=2, tasks=2, selection="first", validation=0.0,
                    test_share=0.3, seed=0,
                )  # fmt: skip
                for task in sequence.tasks:
                    assert task.test.labels.bincount().tolist() == [1, 1]
                    assert len(task.validation.labels) == 0
                if colour is not None:
                    assert sequence.normalization.std == (1.0, 1.0, 1.0)
                batch = next(
                    Batches(sequence.tasks[0].train, sequence.normalization, CPU).ordered(9)
                )
                assert batch[0].isfinite().all()


# The workflow around a training that diverges.

# Without gradients too, weights grow hundredfold at every step.
DIVERGING = {"train": {"lr": 10.0, "weight_decay": 10.0}}
WEAK, STRONG = {"strength": 1.0}, {"strength": 1e12}
SWEEP = {"strategies": ["finetune", "freeze", "ewc"], "metrics": ["mse"], "pcts": [0.25]}
FAILED = "ewc strength 1e+12 shared seed 0"


@pytest.fixture
def workflow(tmp_path, monkeypatch):
    """Return a function that runs commands in a tiny project, after a change of parameters."""
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    yaml = YAML()
    params = yaml.load(REPOSITORY / "profiles" / "demo.yaml")

    def run(*commands, code=0, **sections):
        for name, section in sections.items():
            params[name] |= section
        yaml.dump(params, Path("params.yaml"))
        output = ""
        for command in commands:
            cell_pool._inputs.cache_clear()  # as in a process of its own
            result = CliRunner().invoke(app, command_of(command)[1:])
            assert result.exit_code == code, result.output
            output += result.output
        return output

    params["seeds"] = [0]
    sections = {name: section for name, section in TINY.items() if name != "seeds"}
    run(**sections | {"rank": {"metrics": ["mse"]}, "sweep": SWEEP | {"workers": 1}})
    return run


def trained(folder="."):
    """Return the stored trainings, and when each was stored."""
    return {p: p.stat().st_mtime_ns for p in Path(folder).glob(".permafrost/cells/*/cell.json")}


def line_of(output, start):
    (line,) = [line for line in output.splitlines() if line.startswith(start)]
    return line


def check_failure(told, folder=Path()):
    """Check what is told of the one failed cell, and the tables that show it."""
    count = "1 of 4 cells failed"
    assert told.startswith(f"permafrost: sweep: {count}: {FAILED} (task 2: the loss is ")
    assert "with train.lr=0.001); reports/tables.md shows them" in told
    text = (folder / "reports" / "tables.md").read_text()
    assert "| ewc (failed: 1 of 1 seeds) | – | – | – | – | – | – |  |" in text
    assert re.search(rf"## Failed trainings\n.*\| {re.escape(FAILED)} \| task 2: ", text, re.S)
    for line in ("| finetune | ", "| freeze mse 50% | ", "| 25% | "):
        assert re.search(re.escape(line) + r"\d", text), line
    assert (folder / "reports" / "kept_and_learned.png").exists()


def test_a_failed_cell_in_the_workflow(tally, workflow):
    with tally("failed cells in the workflow") as fault:
        with fault.trial("one method diverges"):
            workflow(*SEED_STAGES, "evaluate", tune={"ewc": [STRONG]})
            output = workflow("tune", "sweep")
            assert "train.lr=0.001" in line_of(output, f"{FAILED} failed: task 2: ")
            check_failure(line_of(workflow("report", code=2), "permafrost: "))
            assert "report" in load_json(Path("reports/timings.json"))["stages"]
            rows = load_json(Path("metrics/sweep.json"))
            statuses = {row["strategy"]: row["status"] for row in rows}
            assert statuses == {"finetune": "done", "freeze": "done", "ewc": "failed"}
        with fault.trial("again: nothing is trained, the same is told"):
            before = trained()
            assert f"{FAILED} failed" in workflow("sweep")
            check_failure(line_of(workflow("report", code=2), "permafrost: "))
            assert trained() == before
            workflow("track")
        with fault.trial("mended"):
            output = workflow("tune", "sweep", "report", tune={"ewc": [WEAK]})
            assert "failed" not in output + Path("reports/tables.md").read_text()
        with fault.trial("one trial diverges"):
            grids = {"ewc": [STRONG, WEAK], "freeze": [{"pct": 0.25}, {"pct": 0.5}]}
            output = workflow("tune", tune=grids)
            assert "ewc: strength 1 (of 2, 1 diverged)" in output
            assert "freeze: pct 0.25 (of 2)" in output or "freeze: pct 0.5 (of 2)" in output
        with fault.trial("all trials diverge"):
            output = workflow("tune", code=2, tune=grids | {"ewc": [STRONG, {"strength": 1e11}]})
            assert output.count("\n") == 1
            assert output.startswith("permafrost: tune.ewc: every trial diverged")
        for stage, task in (("train_first", 1), ("train_second", 2)):
            with fault.trial(stage):
                for file in Path().glob(f"m*/{stage}/0.*"):
                    file.unlink()
                output = workflow(stage, code=2, **DIVERGING)
                assert output.count("\n") == 1
                assert output.startswith(f"permafrost: train: task {task}: ")
                assert output.endswith(" with train.lr=10.0; set a lower learning rate\n")
                assert not list(Path().glob(f"m*/{stage}/0.*"))
            workflow("train_first", train={"lr": 0.001, "weight_decay": 0.0})


def test_a_failed_cell_under_dvc(tally, rounds, tmp_path):
    if not rounds(0, 1):
        pytest.skip("takes minutes: in the long form")
    project = Project(tmp_path / "permafrost")
    rank, sweep = {"metrics": ["mse"]}, SWEEP | {"workers": 2}
    project.change({"rank": rank, "sweep": sweep, "tune": {"ewc": [STRONG]}})
    with tally("failed cells under DVC") as fault:
        with fault.trial("one method diverges"):
            output = project.run("dvc", "repro", code=255)
            check_failure(line_of(output, "permafrost: "), project.folder)
            assert "Traceback" not in output
        with fault.trial("again"):
            before = trained(project.folder)
            output = project.run("dvc", "repro", code=255)
            assert stages_run(output) == ["report"]
            check_failure(line_of(output, "permafrost: "), project.folder)
            assert trained(project.folder) == before
        with fault.trial("mended"):
            project.change({"tune": {"ewc": [WEAK]}})
            assert stages_run(project.run("dvc", "repro")) == ["tune", "sweep", "report"]
            assert "failed" not in (project.folder / "reports" / "tables.md").read_text()
            assert len(trained(project.folder)) == len(before) + 1


def test_the_tables_say_of_how_many_seeds_a_line_is():
    good = {"acc_task1": 0.25, "acc_task2": 0.5, "acc_mean": 0.375, "forgetting": 0.125}
    rows = [good | {"status": "done"}, {"status": "failed"}, good | {"status": "done"}]
    table = accuracy_table(["method"], [(["ewc"], rows), (["si"], rows[1:2])], 2)
    mean, nothing = table.splitlines()[2:]
    assert mean.startswith("| ewc (failed: 1 of 3 seeds) | 25.0 (25.0 to 25.0) | 50.0 ")
    assert nothing == "| si (failed: 1 of 1 seeds) | – | – | – | – |"
