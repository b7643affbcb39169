"""EWC: which task's information it keeps, and how that of several tasks pulls."""

from dataclasses import replace

import pytest
import torch

from lessons import COMMON, HEADS, all_images, make_lesson, one_batch, random
from permafrost.strategies import Ewc, Guard, Keep, Phase, common_parameters, ewc
from permafrost.strategies.ewc import fisher_memory
from permafrost.strategies.fisher import fisher_diagonal
from permafrost.strategies.quadratic import CENTRE, PRECISION, penalised
from permafrost.training import part_of


@pytest.mark.parametrize("head", HEADS)
def test_fisher_is_of_the_task_that_was_learned(make_stirred, make_sequence, head):
    network, sequence = make_stirred(tasks=3, width=0.03), make_sequence(tasks=3)
    memory = fisher_memory(make_lesson(network, sequence, 1, head))
    precision, centre = part_of(memory, PRECISION), part_of(memory, CENTRE)
    parameters = dict(network.named_parameters())
    held = {f"features.{name}" for name, _ in network.features.named_parameters()}
    held |= {f"heads.{index}.{part}" for index in COMMON[head] for part in ("weight", "bias")}
    assert set(precision) == set(centre) == held
    images = [(all_images(sequence.tasks[1].train, sequence), torch.zeros(8))]
    view, names = network.view(head, 1, 2), {p: name for name, p in parameters.items()}
    expected = fisher_diagonal(view, images, [name for name, _ in view.named_parameters()])
    for name, parameter in view.named_parameters():
        if names[parameter] in held:
            torch.testing.assert_close(precision[names[parameter]], expected[name])
    for name in held:
        assert precision[name].max() > 0
        assert torch.equal(centre[name], parameters[name])
    with torch.no_grad():
        network.features[0].weight.add_(1)
    assert not torch.equal(centre["features.0.weight"], network.features[0].weight)


def test_fisher_is_measured_on_as_many_images_as_are_kept(make_network, make_sequence, monkeypatch):
    seen = []

    def note(model, images_by_batches, names):
        seen.append(torch.cat([images for images, _ in images_by_batches]))
        return {}

    monkeypatch.setattr(ewc, "fisher_diagonal", note)
    network, sequence = make_network(tasks=3), make_sequence(tasks=3)
    lesson = make_lesson(network, sequence, 1, keep=Keep(fisher_images=5))
    for asked in (lesson, lesson, replace(lesson, seed=1), replace(lesson, keep=Keep())):
        fisher_memory(asked)
    train = all_images(sequence.tasks[1].train, sequence)
    drawn = [{int((train == image).flatten(1).all(1).nonzero()) for image in part} for part in seen]
    assert [len(part) for part in drawn] == [len(part) for part in seen] == [5, 5, 5, 8]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize("head", HEADS)
def test_the_penalties_of_several_tasks_pull_as_their_sum(make_stirred, make_sequence, head):
    network, sequence, strength = make_stirred(tasks=3), make_sequence(tasks=3), 7.0
    lesson = make_lesson(network, sequence, 0, head)
    first = fisher_memory(replace(lesson, head="shared"))  # it is kept once for all heads
    with torch.no_grad():  # a weight that no task needs is held nowhere, a weight of one there
        first[f"{PRECISION}features.0.weight"][0] = 0
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=random(5)))
    lesson = replace(lesson, learned=1, memory=first)
    second = fisher_memory(lesson)
    merged = Ewc(head, strength).after_phase(lesson, Phase(1, 1), Guard())
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=random(6)))
    view, batch = network.view(head, 2, 3), one_batch(sequence, 2)
    body = list(common_parameters(network, head, 2).values())
    lesson = replace(lesson, learned=2, memory=merged)

    def pull(memory):
        with_, without = (
            torch.autograd.grad(penalised(asked, strength / 2)(view, batch)[0], body)
            for asked in (replace(lesson, memory=memory), replace(lesson, memory={}))
        )
        return [a - b for a, b in zip(with_, without, strict=True)]

    assert Ewc(head, strength).after_phase(lesson, Phase(2, 1), Guard()) is merged  # the last
    for found, one, two in zip(pull(merged), pull(first), pull(second), strict=True):
        scale = found.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(found, one + two, rtol=1e-3, atol=1e-4 * scale + 1e-7)
    for name, value in part_of(merged, PRECISION).items():
        one, two = first.get(f"{PRECISION}{name}", 0), second[f"{PRECISION}{name}"]
        torch.testing.assert_close(value, one + two)
        unknown = value == 0
        centre = merged[f"{CENTRE}{name}"]
        assert torch.equal(centre[unknown], second[f"{CENTRE}{name}"][unknown])
        assert centre.isfinite().all()
