"""The training loop: it learns, resumes to the same bits, and says so when it diverges."""

import copy
import math
import time
from itertools import count

import pytest
import torch
from torch.nn import functional as F

from permafrost.data import Batches
from permafrost.evaluation import Accuracy
from permafrost.freezing import frozen_filters
from permafrost.runs.outcome import Outcome, accuracy_facts
from permafrost.runs.store import RunRequest
from permafrost.strategies import STRATEGIES, Finetune, Learner, PathIntegral, Progress
from permafrost.training import (
    TrainingConfig,
    TrainingDiverged,
    build_optimizer,
    cross_entropy,
    fit,
)

CPU = torch.device("cpu")


@pytest.fixture
def make_batches(make_sequence):
    def build(train=4):
        sequence = make_sequence(train=train)
        return Batches(sequence.tasks[0].train, sequence.normalization, CPU)

    return build


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def train(view, batches, config, seed=0, **options):
    return fit(view, batches, config, generator=generator(seed), **options)


def test_fit_moves_the_weights_and_lowers_the_loss(make_network, make_batches):
    view = make_network(width=0.1).view("shared", 0, 1)
    before = copy.deepcopy(view.state_dict())
    config = TrainingConfig(epochs=6, lr=0.02, batch_size=4, padding=0)
    history = train(view, make_batches(), config)
    after = view.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert history[-1]["train_accuracy"] == 1


def test_loss_and_accuracy_are_means_over_images(make_network, make_batches):
    """With steps too small to matter, uneven batches and no augmentation."""
    view = make_network(batch_norm=False, width=0.1).view("shared", 0, 1)
    batches = make_batches(train=5)
    config = TrainingConfig(epochs=1, lr=1e-30, batch_size=4, padding=0)
    (images, labels) = next(batches.ordered(10))
    view.head.weight.data.normal_(0, 1, generator=generator())
    expected = F.cross_entropy(view(images), labels).item()
    hits = (view(images).argmax(1) == labels).double().mean().item()
    (row,) = train(view, batches, config)
    assert row["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert row["train_accuracy"] == pytest.approx(hits)


def test_measure_joins_the_row_in_eval_mode(make_network, make_batches):
    view = make_network().view("shared", 0, 1)
    modes, states = [], []
    history = train(
        view,
        make_batches(),
        TrainingConfig(epochs=2, batch_size=4),
        measure=lambda: modes.append(view.training) or {"seen": len(modes)},
        on_epoch=lambda state: states.append((state.epoch, len(state.history))),
    )
    assert modes == [False, False]
    assert [row["seen"] for row in history] == [1, 2]
    assert states == [(1, 1), (2, 2)]
    assert not view.training


def test_objective_decides_what_is_compared(make_network, make_batches):
    """One class only: nothing can be lost."""

    def objective(model, batch):
        logits, labels = model(batch.images)[:, :1], torch.zeros_like(batch.labels)
        return F.cross_entropy(logits, labels), logits, labels

    view = make_network().view("shared", 0, 1)
    (row,) = train(
        view, make_batches(), TrainingConfig(epochs=1, batch_size=4), objective=objective
    )
    assert row["train_loss"] == 0
    assert row["train_accuracy"] == 1
    assert torch.equal(view.head.weight, make_network().heads[0].weight)


def test_objective_decides_what_is_minimised(make_network, make_batches, same_bits):
    """Twice the loss is twice the learning rate; what is compared has no say."""

    def run(lr, objective, **options):
        view = make_network().view("shared", 0, 1)
        config = TrainingConfig(epochs=2, lr=lr, batch_size=4, **options)
        rows = train(view, make_batches(), config, objective=objective)
        return view.state_dict(), rows

    def twice(model, batch):
        loss, logits, labels = cross_entropy(model, batch)
        return 2 * loss, -logits, labels

    plain, rows = run(1 / 64, cross_entropy)
    doubled, others = run(1 / 128, twice)
    assert same_bits(plain, doubled)
    for row, other in zip(rows, others, strict=True):
        assert other["train_loss"] == pytest.approx(2 * row["train_loss"], rel=1e-6)
        assert other["train_accuracy"] == 1 - row["train_accuracy"]


def test_what_a_step_learns_from(make_network, make_batches):
    """The plain objective is the mean cross entropy; the batches are numbered from 1."""
    batches, seen = make_batches(train=5), []

    def objective(model, batch):
        assert model.training
        seen.append(batch)
        loss, logits, labels = cross_entropy(model, batch)
        assert labels is batch.labels
        assert torch.equal(loss, F.cross_entropy(logits, batch.labels))
        return loss, logits, labels

    view = make_network(batch_norm=False).view("shared", 0, 1)
    config = TrainingConfig(epochs=2, batch_size=4, padding=0)
    train(view, batches, config, objective=objective)
    numbers = [(batch.epoch, batch.step, len(batch.labels)) for batch in seen]
    assert numbers == [(e, s, n) for e in (1, 2) for s, n in ((1, 4), (2, 4), (3, 2))]
    images, labels = next(batches.ordered(10))
    for batch in seen:
        assert torch.equal(batch.images, images[batch.positions])
        assert torch.equal(batch.labels, labels[batch.positions])
    for part in (seen[:3], seen[3:]):
        positions = torch.cat([batch.positions for batch in part]).tolist()
        assert sorted(positions) == list(range(10))


def test_an_observer_sees_each_step(make_network, make_batches, same_bits):
    """Gradients and old weights before it, the new weights after it; it changes nothing."""
    lr, view = 1 / 64, make_network().view("shared", 0, 1)
    calls = []

    class Watcher:
        def __init__(self):
            self.tensors = {}

        def before_step(self):
            calls.append("before")
            self.old = copy.deepcopy(view.state_dict())
            self.gradients = {name: p.grad.clone() for name, p in view.named_parameters()}

        def after_step(self):
            calls.append("after")
            for name, parameter in view.named_parameters():
                expected = self.old[name] - lr * self.gradients[name]
                assert self.gradients[name].abs().sum() > 0
                torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)

    config = TrainingConfig(epochs=2, lr=lr, momentum=0.0, batch_size=4)
    train(view, make_batches(), config, observer=Watcher())
    assert calls == ["before", "after"] * 4
    plain = make_network().view("shared", 0, 1)
    train(plain, make_batches(), config)
    assert same_bits(view.state_dict(), plain.state_dict())


def test_seconds_are_of_the_epochs_without_measuring(make_network, make_batches):
    states, config = [], TrainingConfig(epochs=3, batch_size=4)

    def run(**options):
        began = time.perf_counter()
        train(
            make_network().view("shared", 0, 1),
            make_batches(),
            config,
            measure=lambda: time.sleep(0.2) or {},
            on_epoch=lambda state: states.append(copy.deepcopy(state)) or time.sleep(0.2),
            **options,
        )
        return time.perf_counter() - began

    wall = run()
    one, two, three = (state.seconds for state in states)
    assert 0 < one < two < three <= wall - 3 * 0.4
    stored = copy.deepcopy(states[0])
    states.clear()
    wall = run(resume=stored)  # time goes on, too
    assert one < states[0].seconds < states[1].seconds <= one + wall - 2 * 0.4


def half_of_all(network):
    return {
        f"{name}": torch.arange(layer.out_channels) % 2 == 0
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Conv2d)
    }


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_resume_gives_the_same_bits(make_network, make_batches, same_bits, optimizer, frozen):
    config = TrainingConfig(
        epochs=3, optimizer=optimizer, lr=0.01, weight_decay=0.01, batch_size=3, flip=True
    )
    batches, states = make_batches(), []

    def run(seed, **options):
        view = make_network().view("shared", 0, 1)
        with frozen_filters(view, half_of_all(view) if frozen else {}):
            observer = PathIntegral(dict(view.named_parameters()))
            history = train(view, batches, config, seed, observer=observer, **options)
        return copy.deepcopy(view.state_dict()), copy.deepcopy(history), observer.tensors

    weights, history, watched = run(0, on_epoch=lambda state: states.append(copy.deepcopy(state)))
    assert [state.epoch for state in states] == [1, 2, 3]
    assert all(value.abs().sum() > 0 for value in watched.values())
    for state in states:
        # The state's generator counts, not the given one.
        again, rows, seen = run(99, resume=state)
        assert same_bits(weights, again)
        assert same_bits(watched, seen)
        assert rows == history


class Killed(Exception):
    pass


@pytest.fixture
def through_disk(make_store):
    """Return a function that stores a progress as a killed run does, and returns what is read."""
    store, numbers = make_store(), count()

    def store_and_read(progress):
        request = RunRequest("first_task", "a cell", {"number": next(numbers)}, {}, ())

        def killed(known, on_epoch):
            on_epoch(progress)
            raise Killed

        with pytest.raises(Killed):
            store.obtain(request, killed)
        read = []
        facts = accuracy_facts(Progress(1, [[Accuracy((1,), (2,))]] * 2))
        store.obtain(request, lambda known, on_epoch: read.append(known) or Outcome(facts, {}, 0.0))
        return read[0]

    return store_and_read


# The trainings by which a task is learned, with their epochs out of three.
TWICE = {
    "packnet": [("retrain", 2), ("learn", 3)],
    "critical_layer": [("trial", 3), ("learn", 3)],
    "fragile_layer": [("trial", 3), ("learn", 3)],
    "edges": [("retrain", 2), ("learn", 3)],
    "circuit": [("relearn", 2), ("learn", 3)],
    "circuit_lwf": [("relearn", 2), ("learn", 3)],
}
SEQUENTIAL = [name for name in STRATEGIES if name != "joint"]


@pytest.mark.parametrize("head", ["shared", "multi", "expanding"])
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequence_resumes_in_its_third_task(
    make_network,
    make_sequence,
    make_strategy,
    learn_first,
    keep,
    through_disk,
    same_bits,
    name,
    head,
):
    """After every epoch; the masks depend on the weights that the task began with."""
    if head not in STRATEGIES[name].heads:
        pytest.skip(f"{name} cannot answer so")
    config = TrainingConfig(epochs=3, optimizer="adam", lr=0.01, batch_size=4, flip=True)
    sequence = make_sequence(tasks=3)
    learner = Learner(sequence, config, head=head, seed=0, device=CPU, keep=keep)

    def masks(lesson, frozen):
        sizes = {
            name: layer.weight.detach().flatten(1).norm(dim=1)
            for name, layer in lesson.network.named_modules()
            if isinstance(layer, torch.nn.Conv2d)
        }
        return {name: size > size.median() for name, size in sizes.items()}

    strategy = make_strategy(name, head, masks)

    def run(network, progress, on_epoch=None):
        while progress.learned < 3:
            learner.learn_task(network, strategy, progress, on_epoch)
        return network.state_dict(), progress

    stored = {}

    def keep_progress(progress):
        if progress.learned == 2:
            stored[progress.phase, progress.training.epoch] = through_disk(progress)

    network = make_network(tasks=3)
    memory = learn_first(network, sequence, config, strategy)
    begun = Progress(1, [learner.measure(network, 1)], memory=memory)
    weights, progress = run(network, begun, keep_progress)
    phases = TWICE.get(name, [("learn", 3)])
    steps = [(phase, epoch) for phase, epochs in phases for epoch in range(1, epochs + 1)]
    assert [(row["task"], row["phase"], row["epoch"]) for row in progress.history] == [
        (task, *step) for task in (2, 3) for step in steps
    ]
    assert len(stored) == len(steps)
    for (phase, epoch), known in stored.items():
        assert (known.learned, known.phase, known.training.epoch) == (2, phase, epoch)
        assert (known.memory == {}) == (name in ("finetune", "linear_probe"))
        resumed, again = run(make_network(tasks=3, seed=5), known)
        assert same_bits(weights, resumed)
        assert same_bits(dict(sorted(progress.memory.items())), dict(sorted(again.memory.items())))
        assert again.rows == progress.rows
        assert again.history == progress.history
        assert again.seconds > 0


def test_the_start_of_a_task_is_kept_while_the_weights_move(make_network, make_sequence, same_bits):
    config = TrainingConfig(epochs=2, lr=0.01, batch_size=4)
    learner = Learner(make_sequence(), config, head="multi", seed=0, device=CPU)
    network, before = make_network(), make_network().state_dict()

    def check(progress):
        assert same_bits(progress.start, before)
        assert not same_bits(network.state_dict(), before)

    learner.learn_task(network, Finetune("multi"), Progress(1, []), check)


def test_divergence_names_the_step_and_the_learning_rate(make_network, make_batches):
    view = make_network(batch_norm=False).view("shared", 0, 1)
    with pytest.raises(TrainingDiverged, match=r"at step 2 of .*train\.lr=1e\+30"):
        train(view, make_batches(), TrainingConfig(epochs=1, lr=1e30, batch_size=4))
    view[-1].bias.data.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 1 "):
        train(view, make_batches(), TrainingConfig(epochs=1, batch_size=4))


@pytest.mark.parametrize("options", [{"padding": 0}, {"padding": 4}, {"padding": 0, "flip": True}])
def test_the_generator_decides_the_bits(make_network, make_batches, same_bits, options):
    config = TrainingConfig(epochs=1, lr=0.01, batch_size=3, **options)

    def run(seed):
        torch.manual_seed(seed + 100)  # the global generator has no say
        view = make_network().view("shared", 0, 1)
        train(view, make_batches(), config, seed)
        return view.state_dict()

    first = run(0)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert same_bits(first, run(0))
    assert not same_bits(first, run(1))
    torch.set_rng_state(state)


def test_a_last_batch_of_one_image_under_batch_norm(make_network, make_batches):
    view = make_network().view("shared", 0, 1)
    config = TrainingConfig(epochs=1, lr=0.01, batch_size=9)
    (row,) = train(view, make_batches(train=5), config)
    assert math.isfinite(row["train_loss"])
    with frozen_filters(view, half_of_all(view)):
        (row,) = train(view, make_batches(train=5), config)
    assert math.isfinite(row["train_loss"])
    assert all(value.isfinite().all() for value in view.state_dict().values())


def test_optimizers():
    weights = [torch.nn.Parameter(torch.ones(2))]
    settings = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    for name, kind in kinds.items():
        optimizer = build_optimizer(name, weights, **settings)
        assert type(optimizer) is kind
        assert optimizer.defaults["lr"] == 0.1
        assert optimizer.defaults["weight_decay"] == 0.2
    assert build_optimizer("sgd", weights, **settings).defaults["momentum"] == 0.5
    with pytest.raises(ValueError, match="lion"):
        build_optimizer("lion", weights, **settings)


def test_dropout_draws_the_same_whatever_ran_before_and_where_it_goes_on(make_batches, same_bits):
    config = TrainingConfig(epochs=3, lr=0.02, batch_size=4, padding=0)
    states = []

    def make():
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 4, 5, 4), torch.nn.Flatten(), torch.nn.Dropout(0.5)]
        return torch.nn.Sequential(*layers, torch.nn.Linear(196, 2))

    whole = make()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(whole, make_batches(), config, on_epoch=lambda state: states.append(copy.deepcopy(state)))
    assert torch.equal(torch.get_rng_state(), before)
    resumed = make()
    torch.manual_seed(8)
    train(resumed, make_batches(), config, resume=states[0])
    assert same_bits(whole.state_dict(), resumed.state_dict())
    rows = [row["train_loss"] for row in states[-1].history]
    assert len(set(rows)) == 3
