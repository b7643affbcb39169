"""Quadratic penalties, EWC's and SI's: by hand, strong ones, and none."""

import copy
from dataclasses import replace

import pytest
import torch

from lessons import (
    CONFIGS,
    HEADS,
    all_images,
    copied_state,
    learn,
    make_lesson,
    one_batch,
    penalty_memory,
)
from permafrost.strategies import Ewc, Finetune, Lwf, Phase, Si, common_parameters
from permafrost.strategies.ewc import fisher_memory
from permafrost.strategies.lwf import teacher_memory
from permafrost.strategies.quadratic import CENTRE, PRECISION, remember
from permafrost.training import TrainingConfig, TrainingDiverged, cross_entropy, part_of


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("method", "factor"), [(Ewc, 1.5), (Si, 3.0)], ids=["ewc", "si"])
def test_the_penalty_by_hand(make_stirred, make_sequence, method, factor, head):
    """EWC's is λ/2 Σ F (θ - θ*)², SI's c Σ Ω (θ - θ*)².

    The first head is pulled where the second task's answers depend on it, and no other.
    """
    network, sequence = make_stirred(), make_sequence()
    memory, batch = penalty_memory(network, shift=0.1), one_batch(sequence, 1)
    lesson = make_lesson(network, sequence, 1, head, memory=memory)
    with method(head, 3.0).while_learning(lesson, Phase(1, 1)) as guard:
        loss, logits, labels = guard.objective(lesson.view(1), batch)
    body = {n: p for n, p in network.named_parameters() if n.startswith("features.")}
    if head != "multi":
        body |= {f"heads.0.{name}": p for name, p in network.heads[0].named_parameters()}
    expected = cross_entropy(lesson.view(1), batch)[0] + factor * sum(
        (memory[f"{PRECISION}{n}"] * (value - memory[f"{CENTRE}{n}"]) ** 2).sum()
        for n, value in body.items()
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, lesson.view(1)(batch.images))
    assert torch.equal(labels, batch.labels)
    gradients = torch.autograd.grad(loss, list(body.values()))
    plain = torch.autograd.grad(cross_entropy(lesson.view(1), batch)[0], list(body.values()))
    for (name, value), found, without in zip(body.items(), gradients, plain, strict=True):
        pull = 2 * factor * memory[f"{PRECISION}{name}"] * (value - memory[f"{CENTRE}{name}"])
        assert pull.abs().max() > 0.01
        torch.testing.assert_close(found, without + pull, rtol=1e-4, atol=1e-5)
    free = list(network.heads[0 if head == "multi" else 1].parameters())
    loss = guard.objective(lesson.view(1), batch)[0]
    plain = cross_entropy(lesson.view(1), batch)[0]
    for pair in zip(
        torch.autograd.grad(loss, free, allow_unused=True),
        torch.autograd.grad(plain, free, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(*(torch.zeros(1) if g is None else g for g in pair))


def test_a_strong_penalty_keeps_the_answers_to_the_first_task(make_stirred, make_sequence):
    """Without BatchNorms, whose statistics no penalty holds, and with a head for each task."""
    network, sequence = make_stirred(heads=0.3, batch_norm=False, width=0.05), make_sequence()
    config = TrainingConfig(epochs=25, lr=0.001, batch_size=4, padding=0)
    precision = part_of(fisher_memory(make_lesson(network, sequence, 0)), PRECISION)
    top = max(value.max() for value in precision.values())
    precision = {name: (value / top).clamp(min=0.3) for name, value in precision.items()}
    memory = remember(precision, common_parameters(network, "multi", 1))
    # A step of momentum SGD on a parabola of curvature h is stable for lr · h < 2 (1 + momentum).
    # The steepest is λ under EWC and 2 c under SI, as the largest precision is 1; half of it here.
    bound = 2 * (1 + config.momentum) / config.lr
    images = all_images(sequence.tasks[0].test, sequence)
    before = network.view("multi", 0, 1)(images).detach()

    def change(strategy):
        trained = copy.deepcopy(network)
        learn(strategy, trained, sequence, config, memory)
        return (trained.view("multi", 0, 1)(images) - before).abs().max().item()

    plain = change(Finetune("multi"))
    assert plain > 0.5 * before.std()
    for strong in (Ewc("multi", bound / 2), Si("multi", bound / 4)):
        assert change(strong) < 0.05 * plain
    # Beyond the bound nothing is held at all.
    with pytest.raises(TrainingDiverged):
        change(Ewc("multi", 2 * bound))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "strategy",
    [method(head, 0.0) for method in (Ewc, Si, Lwf) for head in HEADS],
    ids=lambda strategy: f"{type(strategy).__name__}-{strategy.head}",
)
def test_a_strength_of_zero_is_fine_tuning_bit_for_bit(
    make_stirred, make_sequence, same_bits, strategy, optimizer
):
    """Under momentum and weight decay too; three tasks, so that all is made anew between."""
    network, sequence = make_stirred(tasks=3, width=0.03), make_sequence(tasks=3)
    memory = penalty_memory(network)
    if isinstance(strategy, Lwf):
        memory = teacher_memory(make_lesson(network, sequence, 0, strategy.head))
    plain, config = copy.deepcopy(network), replace(CONFIGS[optimizer], epochs=1)
    before = copied_state(network)
    progress = learn(strategy, network, sequence, config, memory)
    expected = learn(Finetune(strategy.head), plain, sequence, config)
    assert same_bits(network.state_dict(), plain.state_dict())
    assert progress.history == expected.history
    assert progress.rows == expected.rows
    assert not torch.equal(before["features.0.weight"], plain.features[0].weight)
    if isinstance(strategy, Lwf):
        assert set(progress.memory) == set(memory)
    else:
        held = common_parameters(network, strategy.head, 2)
        assert set(progress.memory) == {f"{part}{n}" for part in (PRECISION, CENTRE) for n in held}
    assert not same_bits(progress.memory, memory)
