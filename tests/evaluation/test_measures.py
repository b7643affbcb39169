"""Measures against matrices, classifiers and networks whose answers are known by hand."""

import math
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from permafrost.data import Batches, LabeledImages, Normalization
from permafrost.evaluation import (
    average_accuracy,
    backward_transfer,
    confidence_interval,
    forgetting,
    forward_transfer,
    value_range,
)
from permafrost.evaluation.accuracy import accuracy, accuracy_row
from permafrost.evaluation.drift import mean_drift, response_drift

CPU = torch.device("cpu")
PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# Rows: after 0, 1, 2, 3 tasks; columns: tasks.
THREE = [
    [0.20, 0.85, 0.30],
    [0.90, 0.10, 0.40],
    [0.95, 0.80, 0.35],
    [0.60, 0.50, 0.98],
]
TWO = [[0.2, 0.1], [0.9, 0.3], [0.6, 0.8]]
EXPANDING = [[0.2, None, None], [0.9, None, None], [0.7, 0.8, None], [0.6, 0.5, 0.9]]
JOINT = [[0.2, 0.1, 0.3], [None] * 3, [None] * 3, [0.7, 0.8, 0.9]]


@pytest.mark.parametrize(
    ("measure", "matrix", "expected"),
    [
        (average_accuracy, THREE, (0.60 + 0.50 + 0.98) / 3),
        (average_accuracy, TWO, 0.7),
        (average_accuracy, EXPANDING, 2 / 3),
        (average_accuracy, JOINT, 0.8),
        (average_accuracy, EXPANDING[:3], None),
        (backward_transfer, THREE, ((0.60 - 0.90) + (0.50 - 0.80)) / 2),
        (backward_transfer, TWO, -0.3),
        (backward_transfer, EXPANDING, -0.3),
        (backward_transfer, JOINT, None),
        (forward_transfer, THREE, ((0.10 - 0.85) + (0.35 - 0.30)) / 2),
        (forward_transfer, TWO, 0.2),
        (forward_transfer, EXPANDING, None),
        (forward_transfer, JOINT, None),
        # Task 1 was best after task 2; the untrained 0.85 of task 2 does not count.
        (forgetting, THREE, ((0.95 - 0.60) + (0.80 - 0.50)) / 2),
        (forgetting, TWO, 0.3),
        (forgetting, EXPANDING, 0.3),
        (forgetting, JOINT, None),
    ],
)
def test_measures_by_hand(measure, matrix, expected):
    value = measure(matrix)
    assert value is None if expected is None else value == pytest.approx(expected, abs=1e-12)


def test_a_task_that_got_better_is_forgotten_negatively():
    assert forgetting([[0.1, 0.1], [0.5, 0.1], [0.75, 0.9]]) == pytest.approx(-0.25)


@pytest.mark.parametrize("values", [[0.1, 0.4], [0.31, 0.27, 0.44, 0.29, 0.3], [0.97, 1.0, 0.99]])
def test_confidence_interval_is_students_on_the_logit_scale(values):
    from scipy import stats

    interval = confidence_interval(values)
    mean = statistics.mean(values)
    assert interval.mean == pytest.approx(mean)
    error = statistics.stdev(values) / math.sqrt(len(values)) / (mean * (1 - mean))
    centre = math.log(mean / (1 - mean))
    low, high = stats.t.interval(0.95, len(values) - 1, loc=centre, scale=error)
    assert interval.low == pytest.approx(1 / (1 + math.exp(-low)), rel=1e-9)
    assert interval.high == pytest.approx(1 / (1 + math.exp(-high)), rel=1e-9)


@pytest.mark.parametrize("values", [[0.5, 0.502, 0.499], [0.45, 0.46, 0.44, 0.45, 0.455]])
def test_confidence_interval_in_the_middle_is_students(values):
    from scipy import stats

    interval = confidence_interval(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    low, high = stats.t.interval(0.95, len(values) - 1, loc=statistics.mean(values), scale=error)
    assert interval.low == pytest.approx(low, abs=2e-4)
    assert interval.high == pytest.approx(high, abs=2e-4)


@pytest.mark.parametrize(
    "values",
    [[0.8, 1.0, 1.0], [0.0, 0.0, 0.05], [0.0, 1.0], [1.0, 1.0, 1 - 2**-53], [0.99, 0.98, 0.2]],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_confidence_interval_stays_within_what_is_possible(values, sign):
    share = confidence_interval(values)
    assert 0 <= share.low <= share.mean <= share.high <= 1
    difference = confidence_interval([sign * value for value in values], value_range("forgetting"))
    assert -1 <= difference.low <= difference.mean <= difference.high <= 1


def test_differences_are_mirrored():
    values = [0.3, 0.9, 0.95]
    up, down = (confidence_interval([s * v for v in values], (-1, 1)) for s in (1, -1))
    assert (up.mean, up.low, up.high) == pytest.approx((-down.mean, -down.high, -down.low))


def test_a_value_out_of_bounds_is_refused():
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        confidence_interval([0.5, 1.01])
    with pytest.raises(ValueError, match="allowed: -1 to 1"):
        confidence_interval([math.nan], value_range("forgetting"))


def test_equal_values_have_an_interval_without_width():
    for value in (0.0, 0.1, 0.5, 1.0):
        interval = confidence_interval([value] * 3)
        assert interval.low == interval.mean == interval.high == pytest.approx(value)


@pytest.mark.parametrize(
    ("mean", "spread"), [(0.5, 0.15), (0.9, 0.08), (0.97, 0.03), (0.995, 0.003)]
)
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_holds_the_mean_as_often_as_it_says(mean, spread, seeds):
    """Beta-binomial seeds of 2000 images; Student's own interval holds .97 in 88% of all."""
    draw = np.random.default_rng(0)
    total = mean * (1 - mean) / spread**2 - 1
    networks = draw.beta(mean * total, (1 - mean) * total, (1500, seeds))
    accuracies = draw.binomial(2000, networks) / 2000
    intervals = [confidence_interval(row) for row in accuracies.tolist()]
    held = sum(interval.low <= mean <= interval.high for interval in intervals)
    assert held / len(intervals) > 0.92


def test_confidence_interval_of_one_value_and_of_none():
    interval = confidence_interval([0.25])
    assert (interval.mean, interval.low, interval.high) == (0.25, None, None)
    with pytest.raises(ValueError, match="no values"):
        confidence_interval([])


class Reader(nn.Module):
    """Answers with the class that an image's first pixel holds."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        assert not self.training
        answers = (images[:, 0, 0, 0] * 255).round().long()
        return nn.functional.one_hot(answers, self.classes).float()


def reading_batches(answers, labels):
    images = torch.zeros(len(answers), 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(answers)
    return Batches(LabeledImages(images, torch.tensor(labels)), PLAIN, CPU)


@pytest.mark.parametrize("batch_size", [1, 3, 256])
@pytest.mark.parametrize("offset", [0, 3])
def test_accuracy_per_class(offset, batch_size):
    labels = [0, 0, 0, 0, 1, 1, 2]
    answers = [0, 0, 0, 2, 1, 0, 0]
    batches = reading_batches([answer + offset for answer in answers], labels)
    model = Reader(6).train()
    found = accuracy(model, batches, 3, offset=offset, batch_size=batch_size)
    assert found.overall == pytest.approx(4 / 7)
    assert found.per_class == pytest.approx((0.75, 0.5, 0.0))
    assert model.training


def test_accuracy_without_the_offset_is_wrong_everywhere():
    found = accuracy(Reader(6), reading_batches([3, 4], [0, 1]), 3)
    assert found.overall == 0
    assert found.per_class == (0, 0, 0)  # class 2 has no image


def test_accuracy_row_asks_the_right_head(make_network, make_sequence):
    network, sequence = make_network(tasks=3), make_sequence(tasks=3)
    for index, head in enumerate(network.heads):
        nn.init.zeros_(head.weight)
        # Head k always answers 1 if k is odd, else 0; head 1 outbids the others.
        head.bias.data = torch.tensor([[5.0, 0.0], [0.0, 9.0], [5.0, 0.0]][index])
    tests = [Batches(task.test, sequence.normalization, CPU) for task in sequence.tasks]

    def row(head, seen, networks=(network,) * 3):
        return [e and e.per_class for e in accuracy_row(networks, tests, head, seen)]

    zero, one, never = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)
    assert row("shared", 2) == [zero, zero, zero]
    assert row("multi", 0) == [zero, one, zero]
    assert row("expanding", 0) == row("expanding", 1) == [zero, None, None]
    assert row("expanding", 2) == [never, one, None]
    assert row("expanding", 3) == [never, one, never]

    turned = make_network(tasks=3)  # each task may have a network of its own
    turned.load_state_dict(network.state_dict())
    for head in turned.heads:
        head.bias.data = head.bias.flip(0)
    assert row("shared", 2, (network, turned, network)) == [zero, one, zero]
    assert row("multi", 3, (turned, network, turned)) == [one, one, one]
    assert row("expanding", 2, (turned, network, network)) == [never, one, None]
    with pytest.raises(ValueError, match="zip"):
        row("shared", 2, (network, network))


@pytest.fixture
def pair():
    """Return the same small network twice, and images."""
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
        for _ in range(2)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    return *nets, Batches(LabeledImages(images, torch.zeros(7, dtype=torch.int64)), PLAIN, CPU)


def test_drift_of_equal_networks_is_zero(pair):
    before, after, batches = pair
    drift = response_drift(before.train(), after.train(), batches, ["0", "2"])
    assert {name: values.tolist() for name, values in drift.items()} == {"0": [0] * 4, "2": [0] * 2}
    assert not any(module._forward_hooks for net in (before, after) for module in net.modules())


def test_drift_of_scaled_filters(pair):
    before, after, batches = pair
    with torch.no_grad():
        for layer in (after[0].weight, after[0].bias):
            layer[1] *= 1.5
            layer[2] *= -1
    drift = response_drift(before, after, batches, ["0", "2"], batch_size=3)
    assert drift["0"].tolist() == pytest.approx([0, 0.5, 2, 0], abs=1e-6)
    assert (drift["2"] > 0.01).all()  # its weights are the same, its inputs are not
    images = batches.images.float() / 255
    old, new = (net(images) for net in (before, after))
    expected = (new - old).square().sum((0, 2, 3)).sqrt() / old.square().sum((0, 2, 3)).sqrt()
    assert drift["2"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_drift_of_a_filter_without_response(pair):
    before, after, batches = pair
    with torch.no_grad():
        for net in (before, after):
            net[0].weight[3] = 0
            net[0].bias[3] = 0
    assert response_drift(before, after, batches, ["0"])["0"][3] == 0


def test_mean_drift():
    drift = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 6.0, 9.0])}
    masks = {"a": torch.tensor([True, False]), "b": torch.tensor([True, True, False])}
    means = mean_drift(drift, masks)
    assert means == pytest.approx({"frozen": 10 / 3, "live": 5.5})
    everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
    assert mean_drift(drift, everything) == pytest.approx({"frozen": 4.2, "live": None})
    nothing = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    assert mean_drift(drift, nothing) == pytest.approx({"frozen": None, "live": 4.2})
