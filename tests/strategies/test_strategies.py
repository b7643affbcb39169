"""Strategies: what each of them moves, and the rows of R that it fills."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from permafrost.ranking.method import ExplainConfig, rank_network
from permafrost.strategies import (
    STRATEGIES,
    Ewc,
    Finetune,
    FragileLayer,
    Freeze,
    FreezeEwc,
    FreezeLwf,
    Joint,
    Learner,
    LinearProbe,
    Lwf,
    Progress,
    joint,
    learner,
)
from permafrost.strategies.joint import union
from permafrost.strategies.ranked import RankedMasks
from permafrost.training import Batch, TrainingConfig

CPU = torch.device("cpu")
HEADS = ["shared", "multi", "expanding"]
MODES = [(n, h) for n, made in STRATEGIES.items() for h in HEADS if h in made.heads]


@pytest.fixture
def run(make_network, make_sequence, learn_first, keep):
    """Return a function that learns three tasks, from an untrained network on.

    All by the strategy, or with ``plain_first`` the first one apart; or ``learn`` of them only.
    """

    def run(
        strategy,
        tasks=3,
        classes=2,
        width=0.05,
        lr=0.01,
        epochs=1,
        plain_first=False,
        sequence=None,
        learn=None,
        **options,
    ):
        network = make_network(tasks=tasks, width=width, classes=classes)
        config = TrainingConfig(epochs=epochs, lr=lr, batch_size=4, padding=0)
        sequence = sequence or make_sequence(tasks=tasks, classes=classes)
        learner = Learner(
            sequence, config, head=strategy.head, seed=0, device=CPU, keep=keep, **options
        )
        progress = Progress(0, [learner.measure(network, 0)])
        if plain_first and not isinstance(strategy, Joint):
            progress.memory = learn_first(network, sequence, config, strategy)
            progress.learned = 1
            progress.rows.append(learner.measure(network, 1))
        if learn is None:
            strategy.learn(learner, network, progress)
        for _ in range(learn or 0):
            learner.learn_task(network, strategy, progress)
        return network, progress

    return run


def test_every_strategy_is_tested(make_strategy):
    for name, strategy in STRATEGIES.items():
        built = make_strategy(name, "multi")
        assert type(built) is strategy
        assert built.head == "multi"


# The trainings by which a task is learned, where it is not one; epochs as a multiple of a task's.
PHASES = {
    "packnet": [("retrain", 0.5), ("learn", 1)],
    "critical_layer": [("trial", 1), ("learn", 1)],
    "fragile_layer": [("trial", 1), ("learn", 1)],
    "edges": [("retrain", 0.5), ("learn", 1)],
    "circuit": [("relearn", 1), ("learn", 1)],
    "circuit_lwf": [("relearn", 1), ("learn", 1)],
}


@pytest.mark.parametrize(("name", "head"), MODES)
def test_rows_of_r(run, make_strategy, name, head):
    _, progress = run(make_strategy(name, head), epochs=2, plain_first=True)
    known = [None if row is None else [entry is not None for entry in row] for row in progress.rows]
    whole = [True] * 3
    if head == "expanding":  # before a task is learned, there is no output for its classes
        expected = [[True, False, False], [True, False, False], [True, True, False], whole]
    else:
        expected = [whole] * 4
    if name == "joint":
        expected[1:3] = [None, None]
    assert known == expected
    assert progress.learned == 3
    assert progress.training.epoch == progress.phase == 0
    assert progress.seconds > 0
    for row in progress.rows:
        for entry in row or []:
            if entry is not None:
                assert len(entry.per_class) == 2
                assert entry.overall == pytest.approx(sum(entry.per_class) / 2)
    assert [(row["task"], row["phase"], row["epoch"]) for row in progress.history] == [
        (task, phase, epoch)
        for task in ((3,) if name == "joint" else (2, 3))
        for phase, factor in PHASES.get(name, [("learn", 1)])
        for epoch in range(1, int(2 * factor) + 1)
    ]
    # What is measured after the last epoch is what is measured after the task.
    for task in (2, 3):
        last = [row for row in progress.history if row["task"] == task][-1:]
        for index, entry in enumerate(progress.rows[task] or [] if last else []):
            assert last[0].get(f"acc_task{index + 1}") == (entry and entry.overall)


@pytest.mark.parametrize(("name", "head"), [mode for mode in MODES if mode[1] != "shared"])
def test_tasks_of_unequal_size(run, make_strategy, name, head):
    classes = [3, 2, 4]
    network, progress = run(make_strategy(name, head), classes=classes, plain_first=True)
    assert [layer.out_features for layer in network.heads] == classes
    assert all(value.isfinite().all() for value in network.state_dict().values())
    for row in progress.rows:
        for entry, count in zip(row or [], classes, strict=bool(row)):
            assert entry is None or len(entry.per_class) == count
    assert None not in progress.rows[-1]


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_no_strategy_learns_from_test_images(run, make_strategy, make_sequence, same_bits, name):
    sequence = make_sequence(tasks=3)
    others = make_sequence(tasks=3, seed=1).tasks
    tasks = tuple(
        # Filters are set free by validation images, as hyperparameters are chosen.
        replace(task, test=other.test, validation=task.validation if name == "rnf" else other.train)
        for task, other in zip(sequence.tasks, others, strict=True)
    )
    strategy = make_strategy(name, "multi")
    network, progress = run(strategy, plain_first=True)
    other, changed = run(strategy, plain_first=True, sequence=replace(sequence, tasks=tasks))
    assert same_bits(network.state_dict(), other.state_dict())
    assert same_bits(progress.memory, changed.memory)
    assert progress.rows != changed.rows


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["fragile_layer", "freeze_ewc", "freeze_lwf"])
def test_a_strategy_that_holds_nothing_is_fine_tuning(run, same_bits, half_masks, name, head):
    """Bit for bit, or bit for bit what plain freezing is."""
    freeze = Freeze(head, half_masks)
    strategy, plain = {
        "fragile_layer": (FragileLayer(head, 0.0), Finetune(head)),
        "freeze_ewc": (FreezeEwc(head, freeze, Ewc(head, 0.0)), freeze),
        "freeze_lwf": (FreezeLwf(head, freeze, Lwf(head, 0.0)), freeze),
    }[name]
    network, progress = run(strategy, epochs=2, plain_first=True)
    expected, history = run(plain, epochs=2, plain_first=True)
    assert same_bits(network.state_dict(), expected.state_dict())
    assert [row for row in progress.history if row["phase"] == "learn"] == history.history
    assert progress.rows == history.rows


@pytest.mark.parametrize(("name", "head"), [mode for mode in MODES if mode[0] != "finetune"])
def test_a_strategy_changes_what_is_learned(run, make_strategy, same_bits, name, head):
    network, _ = run(make_strategy(name, head), plain_first=True)
    plain, _ = run(Finetune(head), plain_first=True)
    assert not same_bits(network.features.state_dict(), plain.features.state_dict())


def test_the_curve_measures_every_task(run):
    _, progress = run(Finetune("multi"))
    assert [row["task"] for row in progress.history] == [1, 2, 3]
    for row, measured in zip(progress.history, progress.rows[1:], strict=True):
        assert [row[f"acc_task{task}"] for task in (1, 2, 3)] == [a.overall for a in measured]


def test_fine_tuning_moves_every_layer(run, make_network):
    before, (network, _) = make_network(tasks=3).state_dict(), run(Finetune("multi"))
    assert all(not torch.equal(before[name], v) for name, v in network.state_dict().items())


@pytest.mark.parametrize("head", ["multi", "expanding"])
def test_each_task_is_answered_by_the_outputs_that_were_trained_on_it(run, head):
    _, progress = run(Finetune(head), tasks=2, width=0.1, lr=0.02, epochs=8)
    assert progress.history[-1]["train_accuracy"] == 1
    assert progress.rows[1][0].overall == 1
    assert progress.rows[2][1].overall >= 0.5  # under one softmax chance is 0.25


@pytest.mark.parametrize(
    ("head", "labels", "outputs"),
    [
        ("shared", [{0, 1}] * 3, [2, 2, 2]),
        ("multi", [{0, 1}] * 3, [2, 2, 2]),
        ("expanding", [{0, 1}, {2, 3}, {4, 5}], [2, 4, 6]),
    ],
)
def test_labels_and_outputs_of_each_task(run, monkeypatch, head, labels, outputs):
    seen = []

    def fit(model, batches, config, **options):
        images, _ = next(batches.ordered(2))
        seen.append((set(batches.labels.tolist()), model(images).shape[1]))
        return []

    monkeypatch.setattr(learner, "fit", fit)
    run(Finetune(head))
    assert [entry[0] for entry in seen] == labels
    assert [entry[1] for entry in seen] == outputs


def test_every_seed_and_every_task_has_an_order_of_its_own(
    make_network, make_sequence, monkeypatch, half_masks
):
    states = []

    def fit(model, batches, config, *, generator, **options):
        states.append(tuple(generator.get_state().tolist()))
        return []

    for module in (learner, joint):
        monkeypatch.setattr(module, "fit", fit)

    def ask(seed):
        course = Learner(make_sequence(), TrainingConfig(), head="multi", seed=seed, device=CPU)
        progress = Progress(0, [])
        course.learn_task(make_network(), Finetune("multi"), progress)
        course.learn_task(make_network(), Freeze("multi", half_masks), progress)
        Joint("multi").learn(course, make_network(), Progress(0, []))

    ask(0)
    ask(1)
    assert len(set(states)) == 6
    ask(1)  # the strategy has no say: all of a seed see the same batches
    assert states[6:] == states[3:6]


@pytest.mark.parametrize("head", HEADS)
def test_linear_probe_leaves_every_feature_alone(run, head):
    """Once the first task is learned, plainly."""
    first, _ = run(Finetune(head), lr=0.1, learn=1)
    network, _ = run(LinearProbe(head), lr=0.1)
    for name, value in first.features.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, network.features.state_dict()[name]), name
    last = 0 if head == "shared" else 2
    assert not torch.equal(first.heads[last].weight, network.heads[last].weight)


@pytest.mark.parametrize("name", ["packnet", "critical_layer", "fragile_layer"])
def test_every_phase_has_an_order_of_its_own(run, make_strategy, monkeypatch, name):
    """And the phase that learns sees the batches that plain training sees."""
    states = []

    def fit(model, batches, config, *, generator, **options):
        states.append(tuple(generator.get_state().tolist()))
        return []

    monkeypatch.setattr(learner, "fit", fit)
    run(make_strategy(name, "multi"), plain_first=True)
    assert len(set(states)) == len(states) == 5
    (first, *learned), states[:] = [states[0], *states[2::2]], []
    run(Finetune("multi"), plain_first=True)
    assert states == [first, *learned]


def test_frozen_filters_are_never_released(run, half_masks):
    """Each further task is asked for more, and told what is frozen already."""
    asked, states, known = [], [], []

    def masks(lesson, frozen):
        asked.append(lesson.learned)
        known.append({name: mask.clone() for name, mask in frozen.items()})
        states.append(copy.deepcopy(lesson.network.state_dict()))
        # Another half each time: all filters in the end.
        half = half_masks(lesson, frozen)
        return {name: mask ^ (lesson.learned == 2) for name, mask in half.items()}

    network, progress = run(Freeze("shared", masks))
    assert asked == [1, 2]  # the first task is learned plainly
    half = half_masks(network)
    assert known[0] == {}
    assert all(torch.equal(known[1][name], mask) for name, mask in half.items())
    first, second, last = *states, network.state_dict()
    for name, mask in half.items():
        for part in ("weight", "bias"):
            one, two, three = (state[f"{name}.{part}"] for state in (first, second, last))
            assert torch.equal(one[mask], two[mask])
            assert not torch.equal(one[~mask], two[~mask])
            assert torch.equal(two, three)
        assert Freeze("shared", masks).frozen(network, progress.memory)[name].all()


@pytest.mark.parametrize(("pct", "left"), [(0.5, [4, 2, 1]), (1.0, [0, 0, 0]), (0.0, [8, 8, 8])])
def test_a_share_of_the_free_filters_joins_the_frozen_ones(make_network, make_sequence, pct, left):
    """Down to layers without a live filter."""
    network, sequence = make_network(tasks=4, width=0.125), make_sequence(tasks=4)
    config = ExplainConfig()
    strategy = Freeze("shared", RankedMasks("magnitude", pct, config))
    course = Learner(sequence, TrainingConfig(epochs=1), head="shared", seed=0, device=CPU)
    progress, found, frozen = Progress(0, [course.measure(network, 0)]), [], {}
    course.learn_task(network, strategy, progress)
    for _ in left:
        course.learn_task(network, strategy, progress)
        masks = strategy.frozen(network, progress.memory)
        assert all(masks[name][mask].all() for name, mask in frozen.items())
        found.append(int((~masks["features.0"]).sum()))
        frozen = masks
    assert found == left
    assert progress.rows[-1][-1] is not None


@pytest.mark.parametrize(("mode", "moves"), [("full", False), ("affine", False), ("none", True)])
def test_freeze_hands_its_batch_norm_mode_on(run, half_masks, mode, moves):
    before = run(Finetune("shared"), learn=1)[0].features[1]
    after = run(Freeze("shared", half_masks, batch_norm=mode))[0].features[1]
    assert (before.weight[0] != after.weight[0]).item() == moves
    assert (before.running_mean[0] != after.running_mean[0]).item() == (mode != "full")


@pytest.mark.parametrize(("name", "head"), MODES)
def test_a_strategy_learns_from_the_first_task_on(run, make_strategy, name, head):
    """What comes out is what goes on from a first task that was learned plainly."""
    network, progress = run(make_strategy(name, head))
    other, expected = run(make_strategy(name, head), plain_first=True)
    assert progress.rows[1:] == expected.rows[1:]
    for entry, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[entry]), entry


def test_union_numbers_the_classes_through(make_sequence):
    tasks = make_sequence(classes=[1, 3, 2]).tasks
    whole = union(tasks)
    assert whole.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4
    assert torch.equal(whole.images[4:16], tasks[1].train.images)


def as_batch(images, labels):
    return Batch(images, labels, torch.arange(len(labels)), 1, 1)


def test_joint_answers_each_image_by_its_own_head():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 6, generator=generator)  # three tasks of two classes
    labels = torch.tensor([5, 0, 3, 2, 1, 4, 4])

    def answer(head, outputs):
        """Let a classifier that knows the logits answer."""
        objective = Joint(head).objective([2, 2, 2], CPU)
        loss, chosen, own = objective(lambda images: images, as_batch(outputs, labels))
        assert torch.equal(loss, F.cross_entropy(chosen, own))
        return chosen, own

    chosen, own = answer("multi", logits)
    for index, label in enumerate(labels.tolist()):
        task = label // 2
        assert torch.equal(chosen[index], logits[index, 2 * task : 2 * task + 2])
        assert own[index] == label - 2 * task
    whole, same = answer("expanding", logits)
    assert whole is logits
    assert same is labels
    shared, folded = answer("shared", logits[:, :2])
    assert torch.equal(shared, logits[:, :2])
    assert folded.tolist() == [1, 0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("classes", [[2, 2], [3, 2], [1, 4]], ids=str)
def test_joint_loss_is_the_mean_of_each_heads_own(make_network, classes):
    network = make_network(classes=classes).eval()
    for head in network.heads:
        nn.init.normal_(head.weight)
    tasks, own = [0, 1, 0, 1], [0, 1, classes[0] - 1, 0]
    starts = torch.tensor([0, classes[0]])
    labels = torch.tensor(own) + starts[tasks]
    images = torch.randn(4, 3, 32, 32)
    joint = Joint("multi")
    objective = joint.objective(classes, CPU)
    loss, logits, found = objective(joint.view(network), as_batch(images, labels))
    losses = []
    for image, task, label, answer in zip(images, tasks, own, logits, strict=True):
        naive = network.view("multi", task, 2)(image[None])
        losses.append(F.cross_entropy(naive, torch.tensor([label])))
        torch.testing.assert_close(answer[None, : classes[task]], naive)
        assert answer.argmax() == naive.argmax()
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert found.tolist() == own
    loss.backward()
    assert all(value.grad.isfinite().all() for value in network.parameters())


@pytest.mark.parametrize(("head", "moving"), [("shared", [0]), ("multi", [0, 1, 2])])
def test_joint_trains_the_heads_that_answer(run, make_network, head, moving):
    before = make_network(tasks=3).heads
    network, _ = run(Joint(head))
    moved = [
        not torch.equal(a.weight, b.weight) for a, b in zip(before, network.heads, strict=True)
    ]
    assert moved == [index in moving for index in range(3)]


def test_joint_passes_multiply_the_epochs(run):
    for passes in (1, 3):
        _, progress = run(Joint("expanding", passes=passes))
        assert [row["epoch"] for row in progress.history] == list(range(1, passes + 1))
        assert {row["task"] for row in progress.history} == {3}
        assert set(progress.history[-1]) >= {"acc_task1", "acc_task2", "acc_task3"}


def test_reranking_orders_every_layer(make_network, make_sequence, half_masks):
    from permafrost.data import Batches

    network, sequence = make_network(width=0.01), make_sequence()
    batches = Batches(sequence.tasks[0].train, sequence.normalization, CPU)
    config = ExplainConfig(steps=1)
    before = copy.deepcopy(network.state_dict())

    def rank(criterion, config=config, seed=0):
        view = network.view("shared", 0, 1)
        return rank_network(view, batches, 2, sequence.normalization, criterion, config, seed)

    for criterion in ("mse", "magnitude"):
        orders = rank(criterion)
        assert list(orders) == list(half_masks(network.view("shared", 0, 1)))
        for name, order in orders.items():
            filters = network.view("shared", 0, 1).get_submodule(name).out_channels
            assert order.sort().values.tolist() == list(range(filters))
    weights = network.features[18].weight.detach().flatten(1).abs().sum(1)
    assert rank("magnitude")["features.18"][0] == weights.argmax()
    worst_first = rank("magnitude", ExplainConfig(steps=1, reverse=True))
    assert worst_first["features.18"][-1] == weights.argmax()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
