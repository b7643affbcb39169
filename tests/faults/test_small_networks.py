"""Networks with next to nothing in them: single filters, dead ones, all frozen or none."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch

from edges import CPU, FLAT, MILD, all_finite, masks_of, train
from permafrost.data import Batches
from permafrost.evaluation.accuracy import accuracy
from permafrost.explain import (
    SALIENCY_METHODS,
    class_saliency,
    conv_layers,
    heat_maps,
    start_image,
    visualize_filters,
)
from permafrost.freezing import frozen_filters
from permafrost.ranking import AGGREGATES, METRICS, evaluate_metric, known_criteria
from permafrost.ranking.method import ExplainConfig, rank_network
from permafrost.strategies import STRATEGIES, Learner, PackNet, Progress
from permafrost.training import TrainingConfig, TrainingDiverged

ARCHS = ["vgg11", "vgg13", "vgg16", "vgg19"]


def test_a_network_of_single_filters(tally, rounds, make_network, make_sequence, learn):
    """Explained, ranked, frozen, trained and measured."""
    sequence, settings = make_sequence(), ExplainConfig(steps=1)
    batches = Batches(sequence.tasks[0].train, sequence.normalization, CPU)
    archs = ARCHS[: rounds(1, 4)]
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
