"""The training loop: it learns, resumes to the same bits, and says so when it diverges."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from permafrost.data import Batches
from permafrost.freezing import frozen_filters
from permafrost.strategies import Finetune, Freeze, Learner, Progress
from permafrost.training import TrainingConfig, TrainingDiverged, build_optimizer, fit

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


def test_answer_decides_what_is_compared(make_network, make_batches):
    """One class only: nothing can be lost."""
    (row,) = train(
        make_network().view("shared", 0, 1),
        make_batches(),
        TrainingConfig(epochs=1, batch_size=4),
        answer=lambda logits, labels: (logits[:, :1], torch.zeros_like(labels)),
    )
    assert row["train_loss"] == 0
    assert row["train_accuracy"] == 1


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
            history = train(view, batches, config, seed, **options)
        return copy.deepcopy(view.state_dict()), copy.deepcopy(history)

    weights, history = run(0, on_epoch=lambda state: states.append(copy.deepcopy(state)))
    assert [state.epoch for state in states] == [1, 2, 3]
    for state in states:
        again, rows = run(99, resume=state)  # the state's generator counts, not the given one
        assert same_bits(weights, again)
        assert rows == history


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("head", ["shared", "multi", "expanding"])
def test_a_sequence_resumes_in_its_third_task(make_network, make_sequence, same_bits, head, epoch):
    """The masks depend on the weights that the task began with."""
    config = TrainingConfig(epochs=2, optimizer="adam", lr=0.01, batch_size=4)
    learner = Learner(make_sequence(tasks=3), config, head=head, seed=0, device=CPU)

    def masks(network, learned):
        sizes = {
            name: layer.weight.detach().flatten(1).norm(dim=1)
            for name, layer in network.named_modules()
            if isinstance(layer, torch.nn.Conv2d)
        }
        return {name: size > size.median() for name, size in sizes.items()}

    def run(network, progress, on_epoch=None):
        while progress.learned < 3:
            learner.learn_task(network, Freeze(head, masks), progress, on_epoch)
        return network.state_dict(), progress

    class Killed(Exception):
        pass

    stored = []

    def kill(progress):
        stored[:] = [copy.deepcopy(progress)]
        if (progress.learned, progress.training.epoch) == (2, epoch):
            raise Killed

    start = make_network(tasks=3)
    weights, progress = run(make_network(tasks=3), Progress(1, [learner.measure(start, 1)]))
    with pytest.raises(Killed):
        run(make_network(tasks=3), Progress(1, [learner.measure(start, 1)]), kill)
    resumed, again = run(make_network(tasks=3, seed=5), stored[0])
    assert same_bits(weights, resumed)
    assert again.rows == progress.rows
    assert again.history == progress.history
    assert [(row["task"], row["epoch"]) for row in again.history] == [
        (2, 1),
        (2, 2),
        (3, 1),
        (3, 2),
    ]


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
