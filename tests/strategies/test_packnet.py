"""PackNet: which weights are whose, and what each task's answers keep bit for bit."""

import copy

import pytest
import torch

from lessons import CONFIGS, CPU, all_images, copied_state, learn, watched
from permafrost.strategies import RETRAIN, Finetune, Learner, PackNet, Progress
from permafrost.training import TrainingConfig


class Stage:
    """What there was when a phase of PackNet ended."""

    def __init__(self, strategy, lesson, phase, memory, images):
        self.phase, self.learned = phase.name, lesson.learned
        self.start = copy.deepcopy(lesson.start)
        self.end = copied_state(lesson.network)
        self.owners = {
            name.removeprefix("owner/"): value.clone()
            for name, value in memory.items()
            if name.startswith("owner/")
        }
        tasks = lesson.learned + (self.phase == "learn")
        self.answers = packed_answers(strategy, lesson.network, memory, images, tasks)


def packed_answers(strategy, network, memory, images, tasks):
    return [
        strategy.network_for(network, task, memory)
        .eval()
        .view(strategy.head, task, tasks)(images)
        .detach()
        for task in range(tasks)
    ]


@pytest.fixture(scope="module")
def packed():
    """Hold what was packed, for several tests to look at."""
    return {}


@pytest.fixture
def pack(packed, make_stirred, make_sequence):
    """Return a function that learns three tasks with PackNet, and what there was in between."""

    def run(head, optimizer="sgd", prune=0.6):
        key = (head, optimizer, prune)
        packed[key] = packed.get(key) or train(*key)
        return packed[key]

    def train(head, optimizer, prune):
        network, sequence = make_stirred(tasks=3, width=0.05), make_sequence(tasks=3)
        images = all_images(sequence.tasks[0].test, sequence)
        stages, packnet = [], PackNet(head, prune)

        def note(lesson, phase, memory):
            stages.append(Stage(packnet, lesson, phase, memory, images))

        progress = learn(watched(packnet, note), network, sequence, CONFIGS[optimizer])
        assert [(stage.learned, stage.phase) for stage in stages] == [
            (task, name) for task in (1, 2) for name in (RETRAIN, "learn")
        ]
        return network, progress, stages, images

    return run


@pytest.mark.parametrize("optimizer", list(CONFIGS))
@pytest.mark.parametrize("head", ["shared", "multi"])
def test_packnet_answers_old_tasks_with_the_same_bits(pack, head, optimizer):
    network, progress, stages, images = pack(head, optimizer)
    retrained, learned, again, last = (stage.answers for stage in stages)
    assert torch.equal(retrained[0], learned[0])
    assert torch.equal(retrained[0], again[0])
    assert torch.equal(retrained[0], last[0])
    assert torch.equal(again[1], last[1])
    # Pruning and training do move the others, and the network as it is answers otherwise.
    assert not torch.allclose(learned[1], again[1], atol=1e-3)
    assert not torch.allclose(network.view(head, 0, 3)(images), last[0], atol=1e-3)
    final = packed_answers(PackNet(head, 0.6), network, progress.memory, images, 3)
    assert all(torch.equal(a, b) for a, b in zip(final, last, strict=True))


@pytest.mark.parametrize("prune", [0.6, 1.0])
@pytest.mark.parametrize("head", ["shared", "multi"])
def test_packnet_answers_old_tasks_with_the_same_bits_while_it_learns(
    make_stirred, make_sequence, head, prune
):
    """Also where the first task has left every weight to the next."""
    network, sequence = make_stirred(width=0.05), make_sequence()
    images = all_images(sequence.tasks[0].test, sequence)
    packnet, answers = PackNet(head, prune), []

    def note(progress):
        if progress.phase == 1:
            answers.append(packed_answers(packnet, network, progress.memory, images, 2)[0])

    retrained = []
    spy = watched(packnet, lambda *kept: retrained.append(Stage(packnet, *kept, images).answers[0]))
    learn(spy, network, sequence, on_epoch=note)
    assert len(answers) == 2
    for answer in [*answers, retrained[1]]:
        assert torch.equal(answer, retrained[0])


def is_packed(name, value, head):
    return value.ndim == 4 or (head == "shared" and name == "heads.0.weight")


@pytest.mark.parametrize(("head", "prune"), [("shared", 0.6), ("multi", 0.6), ("shared", 0.3)])
def test_packnet_frees_the_least_share_of_each_layers_own_weights(pack, head, prune):
    network, _, stages, _ = pack(head, prune=prune)
    packed = {n for n, value in network.named_parameters() if is_packed(n, value, head)}
    assert len(packed) == 8 + (head == "shared")
    before = {n: torch.ones_like(network.get_parameter(n), dtype=torch.uint8) for n in packed}
    for stage in stages:
        assert set(stage.owners) == packed
        for name, owner in stage.owners.items():
            assert owner.shape == before[name].shape
            mine = before[name] == stage.learned
            if stage.phase == RETRAIN:
                assert torch.equal(owner[~mine], before[name][~mine])  # what others own is theirs
                freed = mine & (owner == 0)
                assert int(freed.sum()) == round(prune * int(mine.sum()))
                assert torch.equal(owner[mine & ~freed], before[name][mine & ~freed])
                size = stage.start[name].abs()
                if freed.any() and (mine & ~freed).any():
                    assert size[freed].max() <= size[mine & ~freed].min()
                assert stage.end[name][freed].eq(0).all()
            else:  # all that was free now has an owner, and nothing else has changed hands
                assert torch.equal(owner == stage.learned + 1, before[name] == 0)
                assert torch.equal(owner[before[name] != 0], before[name][before[name] != 0])
        before = stage.owners
    sizes = [sum((o == task).sum() for o in before.values()) for task in range(4)]
    assert sizes[0] == 0
    assert sum(sizes) == sum(owner.numel() for owner in before.values())
    assert min(sizes[1:]) > 0


@pytest.mark.parametrize("optimizer", list(CONFIGS))
@pytest.mark.parametrize("head", ["shared", "multi"])
def test_packnet_trains_only_what_is_the_tasks(pack, head, optimizer):
    """Kept weights when it is retrained, free ones when it learns; the rest with the first task."""
    network, _, stages, _ = pack(head, optimizer)
    for stage in stages:
        retraining = stage.phase == RETRAIN
        first = retraining and stage.learned == 1
        task = stage.learned - retraining  # whose head is trained
        for name, end in stage.end.items():
            start = stage.start[name].clone()
            if is_packed(name, end, head):
                owner = stage.owners[name]
                mine = owner == (stage.learned if retraining else stage.learned + 1)
                if retraining:
                    start[owner == 0] = 0
                assert torch.equal(start[~mine], end[~mine]), name
                assert (start != end)[mine].any(), name
            elif name.startswith("heads.") and head == "multi":
                assert torch.equal(start, end) == (name.split(".")[1] != str(task)), name
            elif name.startswith("heads.") and name != "heads.0.bias":
                assert torch.equal(start, end), name
            else:  # biases and BatchNorms, their statistics too
                assert torch.equal(start, end) == (not first), name
    assert any(name.endswith("running_var") for name in network.state_dict())


@pytest.mark.parametrize("head", ["shared", "multi"])
def test_packnet_keeps_the_accuracy_that_retraining_has_left(pack, head):
    _, progress, _, _ = pack(head)
    kept = {
        task: [row for row in progress.history if row["task"] == task and row["phase"] == RETRAIN]
        for task in (2, 3)
    }
    for task in (2, 3):
        assert [row["epoch"] for row in kept[task]] == [1]  # half a task's epochs
        for row in progress.rows[task:]:
            assert row[task - 2].overall == kept[task][-1][f"acc_task{task - 1}"]
    while_learning = [row for row in progress.history if row["phase"] == "learn"]
    assert len({row["acc_task1"] for row in while_learning}) == 1


def test_packnet_learns_the_second_task_with_the_free_weights(make_network, make_sequence):
    network, sequence = make_network(width=0.1), make_sequence(train=6)
    config = TrainingConfig(epochs=10, lr=0.05, batch_size=4, padding=0)
    Learner(sequence, config, head="shared", seed=0, device=CPU).learn_task(
        network, Finetune("shared"), Progress(0, [])
    )
    progress = learn(PackNet("shared"), network, sequence, config)
    learned = [row for row in progress.history if row["phase"] == "learn"]
    assert learned[-1]["train_accuracy"] == 1
    assert learned[-1]["train_loss"] < 0.3 * learned[0]["train_loss"]
    assert progress.rows[2][1].overall == 1
    assert progress.rows[2][0].overall == 1
