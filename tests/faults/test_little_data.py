"""Data with next to nothing in them: one class, one image, one pixel, one colour."""

from dataclasses import replace
from itertools import product

import torch
from torch import nn

from edges import CPU, FLAT, MILD, all_finite, noise, refused, train
from permafrost.data import Batches, ImageDataset, LabeledImages, split_tasks
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
from permafrost.strategies import STRATEGIES
from permafrost.training import cross_entropy


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
