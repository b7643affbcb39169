"""Critical and fragile layers: found by a trial, which is undone."""

import copy

import pytest
import torch

from lessons import CPU, SGD, copied_state, learn, watched
from permafrost.models import NETWORKS, build_network
from permafrost.strategies import (
    CriticalLayer,
    Finetune,
    FragileLayer,
    Freeze,
    Learner,
    Progress,
    layer_change,
    learner,
)
from permafrost.training import fit

LAYERS = [0, 4, 8, 11, 15, 18, 22, 25]  # the convolutions among the features


def test_critical_freezing_takes_what_lies_before_the_first_of_the_most_changed():
    assert CriticalLayer("shared").frozen_layers([0.1, 0.3, 0.2]) == [0]
    assert CriticalLayer("shared").frozen_layers([0.1, 0.3, 0.2, 0.3]) == [0]
    assert CriticalLayer("shared").frozen_layers([0.1, 0.2, 0.3]) == [0, 1]
    assert CriticalLayer("shared").frozen_layers([0.4, 0.2, 0.4]) == []
    assert CriticalLayer("shared").frozen_layers([0.0, 0.0]) == []


def test_fragile_layers_are_the_most_changed_and_the_first_of_equals():
    changes = [0.1, 0.4, 0.2, 0.4, 0.3]
    for share, expected in [(0, []), (0.2, [1]), (0.4, [1, 3]), (0.6, [1, 3, 4]), (1, [*range(5)])]:
        assert FragileLayer("shared", share).frozen_layers(changes) == expected
    assert FragileLayer("shared", 0.5).frozen_layers([0.2] * 4) == [0, 1]
    assert FragileLayer("shared", 0.5).frozen_layers([0.1, 0.2, 0.2, 0.2]) == [1, 2]
    assert FragileLayer("shared", 0.5).frozen_layers([0.3, 0.2, 0.1]) == [0, 1]  # round(1.5)


def change_layer(network, layer):
    """Triple one convolution's maps; its BatchNorm takes that back, so that no other changes."""
    conv, norm = network.features[layer], network.features[layer + 1]
    with torch.no_grad():
        conv.weight.mul_(3)
        conv.bias.mul_(3)
        norm.running_mean.mul_(3)
        norm.running_var.mul_(9)


@pytest.mark.parametrize("learned", [1, 2])
@pytest.mark.parametrize("changed", [0, 3, 7])
@pytest.mark.parametrize("method", ["critical_layer", "fragile_layer"])
def test_the_changed_layer_is_found_and_the_trial_undone(
    make_stirred, make_sequence, same_bits, monkeypatch, method, changed, learned
):
    network, sequence = make_stirred(tasks=3), make_sequence(tasks=3)
    strategy = (
        CriticalLayer("multi") if method == "critical_layer" else FragileLayer("multi", 1 / 8)
    )
    frozen = list(range(changed)) if method == "critical_layer" else [changed]
    before, real, calls, measured = copied_state(network), fit, [], []

    def trial(model, *arguments, **options):
        calls.append(copied_state(network))
        if len(calls) % 2:
            change_layer(network, LAYERS[changed])
            return []
        return real(model, *arguments, **options)

    drift = layer_change.response_drift

    def note_drift(old, new, batches, layers):
        measured.append(drift(old, new, batches, layers))
        last = sequence.tasks[learned - 1].train
        assert torch.equal(batches.images, last.images)
        assert old.head is network.heads[learned - 1]
        assert same_bits(network.state_dict(), before)
        return measured[-1]

    def note(lesson, phase, memory):
        kept.append(dict(memory))
        if phase.name == "trial":
            assert same_bits(lesson.network.state_dict(), before)

    kept = []
    monkeypatch.setattr(learner, "fit", trial)
    monkeypatch.setattr(layer_change, "response_drift", note_drift)
    course = Learner(sequence, SGD, head="multi", seed=0, device=CPU)
    course.learn_task(network, watched(strategy, note), Progress(learned, []))
    (changes,) = measured
    for index, values in enumerate(changes.values()):
        assert values.mean().item() == pytest.approx(2.0 if index == changed else 0.0, abs=1e-3)
    assert list(kept[0]) == [f"features.{LAYERS[index]}" for index in frozen]
    assert all(mask.dtype == torch.bool and mask.all() for mask in kept[0].values())
    for index, layer in enumerate(LAYERS):
        for part in (layer, layer + 1):
            for name, value in network.features[part].state_dict().items():
                same = torch.equal(before[f"features.{part}.{name}"], value)
                assert same == (index in frozen), (part, name)


@pytest.mark.parametrize("strategy", [CriticalLayer("shared"), FragileLayer("shared", 0.5)])
def test_a_real_trial_is_undone_too(make_stirred, make_sequence, same_bits, strategy):
    """After it, the training is the one that plain freezing of those layers does."""
    network, sequence, seen = make_stirred(), make_sequence(), []
    before = copied_state(network)

    def note(lesson, phase, memory):
        seen.append((phase.name, copied_state(lesson.network), dict(memory)))

    plain = copy.deepcopy(network)
    progress = learn(watched(strategy, note), network, sequence)
    assert [name for name, *_ in seen] == ["trial", "learn"]
    assert same_bits(seen[0][1], before)
    assert [row["phase"] for row in progress.history] == ["trial", "trial", "learn", "learn"]
    masks = seen[0][2]
    expected = learn(Freeze("shared", lambda *_: masks), plain, sequence)
    assert same_bits(network.state_dict(), plain.state_dict())
    assert progress.history[2:] == expected.history
    tried = copy.deepcopy(network)
    tried.load_state_dict(before)
    # And the trial is plain training, though in another order.
    course = Learner(sequence, SGD, head="shared", seed=0, device=CPU)
    course.learn_task(tried, Finetune("shared"), Progress(1, []))
    assert progress.history[0]["train_loss"] != expected.history[0]["train_loss"]


def test_layers_before_another_are_those_that_run_before_it(monkeypatch, make_sequence):
    """Whatever the order in which a network has registered them."""

    class Backwards(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = (torch.nn.Conv2d(n, 6, 3) for n in (6, 3))

        def forward(self, images):
            return self.last(self.first(images).relu())

    list(NETWORKS)
    monkeypatch.setitem(NETWORKS._things, "backwards", Backwards)
    network = build_network("backwards", classes=[2, 2], seed=0)
    monkeypatch.setattr(
        layer_change,
        "response_drift",
        lambda before, after, batches, layers: {
            name: torch.full((6,), float(name.endswith("last"))) for name in layers
        },
    )
    progress = learn(CriticalLayer("multi"), network, make_sequence())
    assert list(progress.memory) == ["features.first"]
