"""How far rankings can be trusted: agreement, sanity checks, truth, and what silencing leaves."""

import copy

import pytest
import torch
from scipy.stats import spearmanr

from permafrost.models import build_network
from permafrost.ranking.method import ExplainConfig
from permafrost.ranking.stability import (
    SILENCED,
    Subject,
    accuracy_without_worst,
    agreement,
    check_stability,
    compare_with_truth,
)
from permafrost.strategies import Finetune, Learner, Progress
from permafrost.training import TrainingConfig

CPU = torch.device("cpu")


@pytest.fixture
def subject(make_network, make_sequence):
    network, sequence = make_network(width=0.1), make_sequence(train=24, test=20)
    config = TrainingConfig(epochs=6, lr=0.02, batch_size=4, padding=0)
    course = Learner(sequence, config, head="multi", seed=0, device=CPU)
    course.learn_task(network, Finetune("multi"), Progress(0, []))
    task, view = sequence.tasks[0], network.eval().view("shared", 0, 1)
    explain = ExplainConfig(steps=2)
    return Subject(view, task.train, task.test, 2, sequence.normalization, explain, 0, CPU)


def untrained():
    return build_network("vgg11", classes=[2, 2], seed=0, width=0.1).eval().view("shared", 0, 1)


def test_agreement_of_orders():
    order = torch.tensor([3, 1, 0, 2])
    assert agreement(order, order) == {"spearman": 1.0, "top_half": 1.0}
    found = agreement(order, order.flip(0))
    assert found["spearman"] == pytest.approx(-1)
    assert found["top_half"] == 0
    other = torch.tensor([1, 3, 2, 0])
    expected = spearmanr(order.argsort(), other.argsort()).statistic
    assert agreement(order, other)["spearman"] == pytest.approx(expected)
    assert agreement(torch.tensor([0]), torch.tensor([0])) == {"spearman": 1.0, "top_half": 1.0}


def test_scores_are_compared_class_by_class():
    """Equal scores have the mean of their places, as SciPy has it; constants have none."""
    truth = {"a": torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 5.0], [2.0, 0.0]])}
    scores = {"a": torch.tensor([[1.0, 7.0], [1.0, 7.0], [0.0, 7.0], [4.0, 7.0]])}
    expected = spearmanr(scores["a"][:, 0], truth["a"][:, 0]).statistic
    assert compare_with_truth(scores, truth)["a"] == [pytest.approx(expected), 0.0]
    single = {"a": torch.tensor([[1.0], [2.0], [3.0], [9.0]])}  # knows no classes
    found = compare_with_truth(single, truth)["a"]
    for place, value in enumerate(found):
        assert value == pytest.approx(spearmanr(single["a"][:, 0], truth["a"][:, place]).statistic)


@pytest.mark.parametrize(
    ("criterion", "checks"),
    [
        ("taylor", {"halves", "float64", "random_labels", "random_weights"}),
        ("mse", {"halves", "float64", "random_labels", "random_weights", "start_image"}),
        ("magnitude", {"random_weights"}),
    ],
)
def test_checks_that_a_criterion_depends_on(subject, criterion, checks):
    before = copy.deepcopy(subject.model.state_dict())
    found = check_stability(subject, criterion, untrained())
    assert found.keys() == checks
    layers = subject.orders(criterion)
    for agreements in found.values():
        assert agreements.keys() == layers.keys()
        for values in agreements.values():
            assert -1 <= values["spearman"] <= 1
            assert 0 <= values["top_half"] <= 1
    if criterion == "taylor":
        mean = {check: _mean(values) for check, values in found.items()}
        assert mean["float64"] > 0.95
        assert mean["float64"] > mean["halves"] > mean["random_weights"]
    after = subject.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def _mean(layers):
    return sum(values["spearman"] for values in layers.values()) / len(layers)


def test_a_criterion_that_looks_at_nothing_agrees_with_any_network(subject):
    """By chance: the check of untrained weights would tell an explanation that is none."""
    found = check_stability(subject, "random", untrained())
    assert _mean(found["random_weights"]) == 1


def test_truth_agrees_with_itself(subject):
    truth = subject.scores("ablation")
    for values in compare_with_truth(truth, truth).values():
        assert all(value in (pytest.approx(1), 0.0) for value in values)


def test_what_silencing_leaves(subject):
    """The same as when the worst filters' maps are set to 0 by hand."""
    orders = subject.orders("taylor")
    found = accuracy_without_worst(subject, orders)
    assert [*map(float, found)] == [0, *SILENCED]
    network = copy.deepcopy(subject.model)
    for name, order in orders.items():
        place = int(name.split(".")[1])
        worst = order[len(order) - round(0.25 * len(order) + 1e-9) :]
        norm = network.features[place + 1]
        with torch.no_grad():
            norm.weight[worst] = norm.bias[worst] = 0
    batches = subject.batches(subject.test)
    images, labels = next(batches.ordered(999))
    with torch.no_grad():
        right = (network.eval()(images).argmax(1) == labels).float().mean()
        whole = (subject.model(images).argmax(1) == labels).float().mean()
    assert found["0.0"] == pytest.approx(float(whole))
    if all((0.25 * len(order)) % 1 != 0.5 for order in orders.values()):
        assert found["0.25"] == pytest.approx(float(right))
