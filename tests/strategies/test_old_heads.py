"""Old heads answer while a task is learned, and no optimizer moves them."""

import pytest
import torch

from lessons import CONFIGS, copied_state, learn, make_lesson, one_batch, watched
from permafrost.strategies import Lwf, Phase, Replay
from permafrost.strategies.lwf import TEACHER, distillation, teacher_memory
from permafrost.strategies.replay import buffer_memory


def test_old_heads_stay_and_pass_the_gradient_on(make_stirred, make_sequence):
    network, sequence = make_stirred(tasks=3), make_sequence(tasks=3)
    memory = teacher_memory(make_lesson(network, sequence, 1))
    lesson = make_lesson(network, sequence, 2, memory=memory)
    with torch.no_grad():  # so that its answers differ from the recorded
        for head in network.heads[:2]:
            head.weight.mul_(-1)
    batch, gradients, features = one_batch(sequence, 2), [], list(network.features.parameters())
    for weight in (0.0, 1.0):
        network.zero_grad()
        with Lwf("multi", weight).while_learning(lesson, Phase(2, 1)) as guard:
            guard.objective(lesson.view(2), batch)[0].backward()
        assert all(value.grad is None for head in network.heads[:2] for value in head.parameters())
        assert all(value.grad.ne(0).any() for value in network.heads[2].parameters())
        gradients.append([value.grad.clone() for value in features])
    old = [network.view("multi", task, 2)(batch.images) for task in (0, 1)]
    expected = torch.autograd.grad(distillation(old, memory[TEACHER], 2.0), features)
    for without, whole, kept in zip(*gradients, expected, strict=True):
        assert kept.abs().max() > 0
        torch.testing.assert_close(whole - without, kept, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", list(CONFIGS))
@pytest.mark.parametrize("method", ["lwf", "replay"])
def test_no_optimizer_moves_an_old_head(make_stirred, make_sequence, method, optimizer):
    network, sequence = make_stirred(tasks=3), make_sequence(tasks=3)
    lesson, before = make_lesson(network, sequence, 0), copied_state(network.heads)
    strategy, memory = {
        "lwf": (Lwf("multi", 5.0), teacher_memory),
        "replay": (Replay("multi"), buffer_memory),
    }[method]
    moved = []
    learn(
        watched(strategy, lambda *_: moved.append(copied_state(network.heads))),
        network,
        sequence,
        CONFIGS[optimizer],
        memory(lesson),
    )
    for index, (old, new) in enumerate([(before, moved[0]), (moved[0], moved[1])], start=1):
        for name in old:
            assert torch.equal(old[name], new[name]) == (name[0] != str(index)), name
