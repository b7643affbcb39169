"""Accuracy where the task is not told: one softmax over all classes of all tasks."""

import copy

import pytest
import torch

from permafrost.data import Batches
from permafrost.evaluation.accuracy import accuracy_row, row_without_task

CPU = torch.device("cpu")
CLASSES = [2, 3, 2]


def setting(make_network, make_sequence, classes):
    network, sequence = make_network(tasks=3, classes=classes), make_sequence(3, classes, test=5)
    with torch.no_grad():
        for head in network.heads:
            head.weight.mul_(100)
    tests = [Batches(task.test, sequence.normalization, CPU) for task in sequence.tasks]
    return network.eval(), tests


def by_hand(networks, tests, head):
    """Join the logits of each task's own network, image by image."""
    rows, counts = [], networks[0].classes
    for task, test in enumerate(tests):
        correct = [0] * counts[task]
        for place in range(len(test)):
            image, label = test.at(torch.tensor([place])), int(test.labels[place])
            with torch.no_grad():
                joined = torch.cat(
                    [
                        network.heads[0 if head == "shared" else t](
                            torch.nn.functional.adaptive_avg_pool2d(
                                network.features(image), 1
                            ).flatten(1)
                        )
                        for t, network in enumerate(networks)
                    ],
                    dim=1,
                )
            correct[label] += int(joined.argmax()) == sum(counts[:task]) + label
        rows.append(tuple(correct))
    return rows


@pytest.mark.parametrize("head", ["multi", "expanding"])
@pytest.mark.parametrize("apart", [False, True], ids=["one network", "a network for each task"])
def test_all_tasks_logits_are_joined(make_network, make_sequence, head, apart):
    network, tests = setting(make_network, make_sequence, CLASSES)
    networks = [network] * 3
    if apart:
        networks = [copy.deepcopy(network) for _ in range(3)]
        with torch.no_grad():
            for factor, other in enumerate(networks):
                other.features[0].weight.mul_(1 + factor)
    row = row_without_task(networks, tests, head)
    assert [entry.correct for entry in row] == by_hand(networks, tests, head)
    assert [len(entry.count) for entry in row] == CLASSES
    if not apart:  # an expanding head is never told
        told = accuracy_row(networks, tests, "expanding", 3)
        assert row == told


def test_a_shared_head_tells_tasks_apart_by_their_networks_alone(make_network, make_sequence):
    network, tests = setting(make_network, make_sequence, 2)
    assert row_without_task([network] * 3, tests, "shared") is None
    networks = [copy.deepcopy(network) for _ in range(3)]
    row = row_without_task(networks, tests, "shared")
    # Of equal logits the first counts: all images are taken for the first task's.
    assert [sum(entry.correct) for entry in row[1:]] == [0, 0]
    with torch.no_grad():
        networks[1].heads[0].bias.add_(1e3)
    row = row_without_task(networks, tests, "shared")
    assert [entry.correct for entry in row] == by_hand(networks, tests, "shared")
    assert sum(row[1].correct) > 0 == sum(row[0].correct)
