"""Learning without Forgetting: the teacher's answers and the objective, by hand."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lessons import HEADS, SGD, all_images, copied_state, learn, make_lesson, one_batch, random
from permafrost.data import LabeledImages
from permafrost.strategies import Freeze, FreezeLwf, Lwf, Phase, lwf
from permafrost.strategies.lwf import TEACHER, distillation, teacher_memory
from permafrost.training import TrainingConfig, fit


def test_distillation_by_hand():
    """With T = 2 the teacher is sure of the first class by 3/4, and the network by 1/5."""
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    logits = torch.tensor([[0.0, 2 * math.log(4)]])
    one = -(0.75 * math.log(0.2) + 0.25 * math.log(0.8))
    assert distillation([logits], teacher, 2.0).item() == pytest.approx(one)
    # At T = 1 these are 9/10 and 1/17.
    hard = -(0.9 * math.log(1 / 17) + 0.1 * math.log(16 / 17))
    assert distillation([logits], teacher, 1.0).item() == pytest.approx(hard)
    # Groups of any size add up, each with a softmax of its own; images are averaged.
    three = torch.zeros(1, 3)
    both = distillation([logits, three], torch.cat([teacher, three], 1), 2.0)
    assert both.item() == pytest.approx(one + math.log(3))
    even = torch.zeros(2, 2)
    images = distillation([torch.cat([logits, even])], torch.cat([teacher, even]), 2.0)
    assert images.item() == pytest.approx((one + 2 * math.log(2)) / 3)


@pytest.mark.parametrize("head", HEADS)
def test_the_teacher_is_the_old_networks_answer_to_the_plain_images(
    make_stirred, make_sequence, head
):
    classes = [2, 2, 2, 2] if head == "shared" else [2, 3, 2, 4]
    network, sequence = make_stirred(classes=classes), make_sequence(classes=classes)
    lesson = make_lesson(network.train(), sequence, 1, head)  # two tasks are learned
    before = copied_state(network)
    (answers,) = teacher_memory(lesson).values()
    images = all_images(sequence.tasks[2].train, sequence)
    network.eval()
    if head == "multi":
        expected = torch.cat([network.view(head, task, 2)(images) for task in (0, 1)], 1)
    else:
        expected = network.view(head, 0, 2)(images)
    assert answers.shape == (8, 2 if head == "shared" else 5)
    torch.testing.assert_close(answers, expected.detach())
    assert not answers.requires_grad
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())


def test_the_teachers_rows_go_with_their_images(make_stirred, make_sequence, monkeypatch):
    """Image i has the grey 20 i, by which it is known though the epoch is shuffled and cropped."""
    sequence = make_sequence(train=5)
    grey = torch.arange(10, dtype=torch.uint8)[:, None, None, None] * 20
    marked = LabeledImages(grey.expand(10, 3, 32, 32).contiguous(), torch.arange(10) % 2)
    tasks = (sequence.tasks[0], replace(sequence.tasks[1], train=marked))
    sequence = replace(sequence, tasks=tasks)
    rows = torch.randn(10, 2, generator=random(3))
    network, order = make_stirred(), []
    lesson = make_lesson(network, sequence, 1, memory={TEACHER: rows})
    monkeypatch.setattr(lwf, "distillation", lambda logits, teacher, _: note(logits, teacher))
    current = []

    def note(logits, teacher):
        images = (current[-1][:, 0, 16, 16] * 0.25 + 0.5) * 255 / 20
        index = images.round().long()
        order.extend(index.tolist())
        assert torch.equal(teacher, rows[index])
        return logits[0].sum() * 0

    with Lwf("multi").while_learning(lesson, Phase(1, 1)) as guard:

        def objective(model, batch):
            current.append(batch.images)
            return guard.objective(model, batch)

        fit(lesson.view(1), lesson.batches(1), SGD, generator=random(), objective=objective)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert order[:10] != list(range(10))


@pytest.mark.parametrize("head", HEADS)
def test_the_objective_of_lwf_by_hand(make_stirred, make_sequence, head):
    """Cross entropy by the new task's view, and what each old view answers at temperature 3."""
    classes = [2, 2, 2] if head == "shared" else [3, 2, 2]
    network, sequence = make_stirred(classes=classes), make_sequence(classes=classes)
    groups = {"shared": [2], "multi": [3, 2], "expanding": [5]}[head]
    rows = torch.randn(8, sum(groups), generator=random(3))
    lesson = make_lesson(network, sequence, 2, head, memory={TEACHER: rows})
    batch = one_batch(sequence, 2, torch.tensor([6, 1, 4]))
    with Lwf(head, 0.7, 3.0).while_learning(lesson, Phase(2, 1)) as guard:
        loss, logits, labels = guard.objective(lesson.view(2), batch)
    torch.testing.assert_close(logits, network.view(head, 2, 3)(batch.images))
    assert torch.equal(labels, batch.labels)
    expected = F.cross_entropy(logits, labels)
    for group, kept in enumerate(rows[[6, 1, 4]].split(groups, dim=1)):
        old = network.view(head, group, 2)(batch.images)
        targets = F.softmax(kept / 3, dim=1)
        expected = expected + 0.7 * F.cross_entropy(old / 3, targets)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("head", "frozen"), [*((head, False) for head in HEADS), ("multi", True)])
def test_a_heavy_weight_keeps_the_recorded_answers(
    make_stirred, make_sequence, half_masks, head, frozen
):
    network, sequence = make_stirred(batch_norm=False, width=0.1), make_sequence()
    memory = teacher_memory(make_lesson(network, sequence, 0, head))
    images = all_images(sequence.tasks[1].train, sequence)
    targets = memory[TEACHER].softmax(1)
    config = TrainingConfig(epochs=20, lr=0.005, momentum=0.5, batch_size=8, padding=0)

    def error(weight):
        trained, strategy = copy.deepcopy(network), Lwf(head, weight, 1.0)
        if frozen:
            strategy = FreezeLwf(head, Freeze(head, half_masks), strategy)
        learn(strategy, trained, sequence, config, memory)
        return (trained.view(head, 0, 1)(images).softmax(1) - targets).abs().mean().item()

    plain = error(0.0)
    assert plain > 0.05
    assert error(5.0) < 0.4 * plain
