"""Replay: the buffer, and how old images are learned beside new ones."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lessons import HEADS, SGD, learn, make_lesson, one_batch
from permafrost.data import LabeledImages, normalize
from permafrost.strategies import Keep, Phase, Replay, replay
from permafrost.strategies.replay import buffer_memory


def buffered(memory, task):
    return memory[f"{task}/images"], memory[f"{task}/labels"]


@pytest.mark.parametrize(
    ("size", "per_class", "counts"),
    [(6, 4, [2, 2, 2]), (7, 4, [2, 2, 3]), (2, 4, [0, 1, 1]), (50, 4, [4, 4, 4])],
)
def test_the_buffer_is_balanced_and_drawn_from_training_images(
    make_network, make_sequence, size, per_class, counts
):
    sequence = make_sequence(tasks=3, classes=3, train=per_class)
    network = make_network(tasks=3, classes=3)
    lesson = make_lesson(network, sequence, 1, keep=Keep(buffer_images=size))
    memory = buffer_memory(lesson)
    assert set(memory) == {"1/images", "1/labels"}
    images, labels = buffered(memory, 1)
    assert sorted(torch.bincount(labels, minlength=3).tolist()) == counts
    train = sequence.tasks[1].train
    found = [(train.images == image).flatten(1).all(1).nonzero().item() for image in images]
    assert len(set(found)) == len(found) == min(size, len(train))
    assert torch.equal(train.labels[found], labels)
    assert images.dtype == torch.uint8
    again, other = buffer_memory(lesson), buffer_memory(replace(lesson, seed=1))
    assert torch.equal(again["1/images"], images)
    if size < len(train):
        assert not torch.equal(other["1/images"], images)


def test_the_buffer_of_classes_of_unequal_size(make_network, make_sequence):
    sequence = make_sequence(classes=3, train=6)
    train = sequence.tasks[0].train
    chosen = torch.tensor([0, 6, 7, 8, 12, 13, 14, 15, 16])  # 1, 3 and 5 images
    task = replace(
        sequence.tasks[0], train=LabeledImages(train.images[chosen], train.labels[chosen])
    )
    lesson = make_lesson(
        make_network(classes=3), replace(sequence, tasks=(task,)), 0, keep=Keep(buffer_images=6)
    )
    _, labels = buffered(buffer_memory(lesson), 0)
    assert torch.bincount(labels).tolist() in ([1, 2, 3], [1, 3, 2])


@pytest.mark.parametrize("head", HEADS)
def test_every_step_learns_old_images_by_their_own_tasks_outputs(make_stirred, make_sequence, head):
    """With BatchNorm in eval mode, one pass over all images is as good as one for each task."""
    network, sequence = make_stirred(tasks=3), make_sequence(tasks=3)
    keep = Keep(buffer_images=6)
    lesson = make_lesson(network, sequence, 1, head, keep=keep)
    memory = buffer_memory(replace(lesson, learned=0)) | buffer_memory(lesson)
    lesson = replace(lesson, learned=2, memory=memory)
    batch = one_batch(sequence, 2, torch.tensor([0, 5, 6, 3, 7]))
    batch = replace(batch, labels=batch.labels + network.label_offset(head, 2))
    view = network.view(head, 2, 3).eval()
    with Replay(head).while_learning(lesson, Phase(2, 1)) as guard:
        first = guard.draw(batch)
        loss, logits, labels = guard.objective(view, replace(batch, drawn=first))
        same = guard.draw(batch)
        strangers = [guard.draw(replace(batch, step=2)), guard.draw(replace(batch, epoch=2))]
    torch.testing.assert_close(logits, view(batch.images))
    assert torch.equal(labels, batch.labels)
    drawn = list(zip(first[::3], first[1::3], strict=True))
    assert len(drawn) == 2
    losses = []
    for task, (images, own) in enumerate(drawn):
        assert len(images) == 2  # together about as many as the new ones
        mine = network.label_offset(head, task)
        losses.append(F.cross_entropy(network.view(head, task, 3)(images), own + mine))
    expected = F.cross_entropy(view(batch.images), batch.labels) + sum(losses) / 2
    torch.testing.assert_close(loss, expected)
    # A step draws the same images each time it is taken, and every step others.
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    for others in strangers:
        assert any(not torch.equal(a, b) for a, b in zip(first, others, strict=True))


def test_replayed_images_come_from_the_buffer_with_their_labels(
    make_stirred, make_sequence, monkeypatch
):
    network, sequence = make_stirred(), make_sequence()
    lesson = make_lesson(network, sequence, 0, keep=Keep(buffer_images=4))
    memory, drawn, real = buffer_memory(lesson), [], replay._draw

    def draw(*arguments):
        drawn.append(real(*arguments))
        return drawn[-1]

    monkeypatch.setattr(replay, "_draw", draw)
    learn(Replay("multi"), network, sequence, replace(SGD, padding=0, flip=False), memory)
    images, labels = buffered(memory, 0)
    images = normalize(images, sequence.normalization)
    assert len(drawn) == 4
    for step, own, _ in drawn:
        index = [(images == image).flatten(1).all(1).nonzero().item() for image in step]
        assert sorted(index) == [0, 1, 2, 3]
        assert torch.equal(labels[index], own)
