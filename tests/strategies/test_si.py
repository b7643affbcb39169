"""SI: the gradient that it records, and the importances made of it."""

from dataclasses import replace

import pytest
import torch

from lessons import COMMON, HEADS, SGD, copied_state, make_lesson, penalty_memory, random
from permafrost.strategies import INTEGRAL, Guard, PathIntegral, Phase, Si, common_parameters
from permafrost.strategies.quadratic import CENTRE, PRECISION
from permafrost.strategies.si import importance, integral_memory
from permafrost.training import cross_entropy, fit, part_of


@pytest.mark.parametrize("head", HEADS)
def test_si_records_the_gradient_of_the_loss_alone(make_stirred, make_sequence, head):
    network, sequence = make_stirred(batch_norm=False, tasks=3), make_sequence(tasks=3)
    memory = penalty_memory(network, shift=0.05)
    lesson = make_lesson(network, sequence, 1, head, memory=memory, start=copied_state(network))
    body, plain, whole = common_parameters(network, head, 2), [], []
    assert {int(name.split(".")[1]) for name in body if "heads" in name} == set(COMMON[head])

    with Si(head, 2.0).while_learning(lesson, Phase(1, 1)) as guard:

        def objective(model, batch):
            loss = cross_entropy(model, batch)[0]
            plain.append(torch.autograd.grad(loss, list(body.values())))
            return guard.objective(model, batch)

        class Naive:
            tensors = {name: torch.zeros_like(value) for name, value in body.items()}  # noqa: RUF012
            regularised = {name: torch.zeros_like(value) for name, value in body.items()}  # noqa: RUF012

            def before_step(self):
                guard.observer.before_step()
                whole.append([value.grad.clone() for value in body.values()])
                self.before = [value.detach().clone() for value in body.values()]

            def after_step(self):
                guard.observer.after_step()
                for i, (name, value) in enumerate(body.items()):
                    move = value.detach() - self.before[i]
                    self.tensors[name] -= plain[-1][i] * move
                    self.regularised[name] -= whole[-1][i] * move

        naive = Naive()
        config = replace(SGD, lr=0.01)
        fit(
            lesson.view(1),
            lesson.batches(1),
            config,
            generator=random(),
            objective=objective,
            observer=naive,
        )
    found = guard.observer.tensors
    assert len(plain) == 4
    assert set(found) == set(body)
    for name, expected in naive.tensors.items():
        scale = naive.regularised[name].abs().max().item()
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4 * scale)
        same = torch.allclose(found[name], naive.regularised[name], rtol=0.1, atol=0.1 * scale)
        assert same == (f"{PRECISION}{name}" not in memory)


def test_importance_by_hand():
    """max(0, ω) / (Δ² + 0.1)."""
    omega = {"w": torch.tensor([0.2, -0.3, 0.7])}
    start, end = {"w": torch.tensor([1.0, 0.0, 2.0])}, {"w": torch.tensor([0.5, 1.0, 2.0])}
    (found,) = importance(omega, start, end).values()
    torch.testing.assert_close(found, torch.tensor([0.2 / 0.35, 0.0, 7.0]))


@pytest.mark.parametrize("head", HEADS)
def test_importances_add_up_and_the_centre_is_the_last_tasks(make_stirred, make_sequence, head):
    network, sequence = make_stirred(tasks=3), make_sequence(tasks=3)
    start = copied_state(network)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.3)
    body = common_parameters(network, "shared", 1)
    omega = {name: torch.randn(value.shape, generator=random(2)) for name, value in body.items()}
    first = {f"{INTEGRAL}{name}": value for name, value in omega.items()}
    memory = integral_memory(make_lesson(network, sequence, 0, "shared", memory=first, start=start))
    with torch.no_grad():
        for value in network.parameters():
            value.sub_(0.5)
    body = common_parameters(network, head, 2)
    second = {name: torch.randn(value.shape, generator=random(3)) for name, value in body.items()}
    observer = PathIntegral(body)
    observer.tensors = second
    lesson = make_lesson(
        network,
        sequence,
        1,
        head,
        memory=memory,
        start={name: value + 0.5 for name, value in copied_state(network).items()},
    )
    merged = Si(head).after_phase(lesson, Phase(1, 1), Guard(observer=observer))
    heads = {int(n.split(".")[1]) for n in part_of(merged, PRECISION) if n.startswith("heads.")}
    assert heads == set(COMMON[head])
    for name, value in omega.items():
        one = value.clamp(min=0) / (0.3**2 + 0.1)
        torch.testing.assert_close(memory[f"{PRECISION}{name}"], one)
    for name, value in body.items():
        one = memory.get(f"{PRECISION}{name}", 0)  # nothing of a head that the task has added
        two = second[name].clamp(min=0) / (0.5**2 + 0.1)
        torch.testing.assert_close(merged[f"{PRECISION}{name}"], one + two)
        assert torch.equal(merged[f"{CENTRE}{name}"], value)
        if f"{CENTRE}{name}" in memory:
            assert not torch.equal(merged[f"{CENTRE}{name}"], memory[f"{CENTRE}{name}"])
