"""Steps that are recorded and replayed learn what plain ones do, by every method."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from lessons import CPU, SGD
from permafrost.data import Batches
from permafrost.freezing import layers
from permafrost.strategies import STRATEGIES, Finetune, Guard, Learner, Progress
from permafrost.training import cross_entropy, fit, loop, recordable
from permafrost.training.steps import RecordedStep
from tape import on_tape

# Two classes of seven images are three batches of four and one of two.
SIZES = {"train": 7, "tasks": 3}


@pytest.fixture
def taken(monkeypatch):
    """Return how each step is taken, of those that can be recorded."""
    found = []

    class Noted(RecordedStep):
        def __call__(self, batch):
            results = super().__call__(batch)
            found.append("replayed" if self._recorded and len(batch.labels) == 4 else "plain")
            return results

    monkeypatch.setattr(loop, "RecordedStep", Noted)
    return found


@pytest.fixture
def record(monkeypatch, taken):
    """Return a switch: from then on steps are recorded, as on a GPU."""

    def switch(recorder=on_tape):
        monkeypatch.setattr(loop, "recorder", lambda device: recorder)

    return switch


@pytest.fixture
def learn_all(make_network, make_sequence, keep):
    """Return a function that learns the tasks that follow; it returns weights and history."""

    def learn_all(strategy, memory=None, learned=1, network=None):
        network = network or make_network(tasks=3)
        course = Learner(
            make_sequence(**SIZES), SGD, head=strategy.head, seed=0, device=CPU, keep=keep
        )
        progress = Progress(learned, [None] * (learned + 1), memory=memory or {})
        strategy.learn(course, network, progress)
        return network.state_dict(), progress.history

    return learn_all


@pytest.mark.parametrize(
    ("name", "head"), [("joint", "shared"), *((name, "multi") for name in sorted(STRATEGIES))]
)
def test_recorded_steps_learn_the_same_bits(
    make_network, make_sequence, make_strategy, learn_first, learn_all, monkeypatch, record, taken,
    same_bits, name, head,
):  # fmt: skip
    strategy = make_strategy(name, head)
    network = make_network(tasks=3)
    memory = learn_first(network, make_sequence(**SIZES), SGD, strategy)
    # A GPU holds frozen filters in this form.
    monkeypatch.setattr(layers, "_has_arithmetic_to_spare", lambda device: True)
    weights, history = learn_all(strategy, memory, network=copy.deepcopy(network))
    record()
    recorded, again = learn_all(strategy, memory, network=network)
    assert same_bits(recorded, weights)
    assert again == history
    assert taken.count("replayed") >= 3 * taken.count("plain") > 0


def test_a_stopped_training_goes_on_with_recorded_steps(
    make_network, make_sequence, record, taken, same_bits
):
    """To record moves nothing: neither weights, statistics and momentum nor what is drawn."""
    record()
    sequence = make_sequence(**SIZES)
    batches = Batches(sequence.tasks[0].train, sequence.normalization, CPU)
    states = []

    def train(**options):
        view = make_network().view("shared", 0, 1)
        config, draws = replace(SGD, epochs=3), torch.Generator().manual_seed(0)
        fit(view, batches, config, generator=draws, **options)
        return view.state_dict()

    whole = train(on_epoch=lambda state: states.append(copy.deepcopy(state)))
    assert same_bits(train(resume=states[0]), whole)
    assert taken.count("replayed") == 3 * 5


def test_what_cannot_be_recorded_is_taken_plainly(learn_all, record, taken, same_bits):
    weights, _ = learn_all(Finetune("multi"))
    record(lambda operations: None)
    with pytest.warns(UserWarning, match="reads numbers back"):
        again, _ = learn_all(Finetune("multi"))
    assert same_bits(again, weights)
    assert set(taken) == {"plain"}


@pytest.mark.parametrize("says", [False, True])
def test_an_own_objective_is_recorded_if_it_says_so(learn_all, record, taken, says):
    """It may count its steps, which a replay would not."""
    calls = []

    def counting(model, batch):
        calls.append(batch.step)
        return cross_entropy(model, batch)

    class Own(Finetune):
        def while_learning(self, lesson, phase):
            return nullcontext(Guard(recordable(counting) if says else counting))

    record()
    learn_all(Own("multi"))
    assert bool(taken) == says
    assert (len(calls) < 2 * 2 * 4) == says


@pytest.mark.parametrize("says", [False, True])
def test_an_own_module_is_recorded_if_it_says_so(make_network, learn_all, record, taken, says):
    class Counting(nn.ReLU):
        recordable = says

    network = make_network(tasks=3)
    network.features[2] = Counting()
    record()
    learn_all(Finetune("multi"), network=network)
    assert bool(taken) == says
