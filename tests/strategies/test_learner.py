"""The learner: trainings in several phases resume to the same bits."""

import copy
from dataclasses import replace

import pytest

from lessons import CPU, HEADS, SGD, learn, make_lesson, penalty_memory
from permafrost.data import Batches
from permafrost.strategies import Joint, Learner, PackNet, Progress, Replay
from permafrost.strategies.circuit import Circuit
from permafrost.strategies.fragile_layer import FragileLayer
from permafrost.strategies.replay import buffer_memory
from permafrost.training import TrainingConfig


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *((name, "multi") for name in ("replay", "packnet", "critical_layer", "freeze_ewc")),
        *(("si", head) for head in HEADS),
    ],
)
def test_a_training_resumes_to_the_same_bits(
    make_stirred, make_sequence, make_strategy, same_bits, name, head
):
    """In several phases, in a network that is otherwise new."""
    sequence, stored = make_sequence(tasks=3), []
    strategy = make_strategy(name, head)
    network = make_stirred(tasks=3, width=0.03)
    lesson = make_lesson(network, sequence, 0)
    memory = {"replay": buffer_memory, "packnet": lambda _: {}, "critical_layer": lambda _: {}}.get(
        name, lambda lesson: penalty_memory(lesson.network)
    )(lesson)
    straight = learn(
        strategy,
        network,
        sequence,
        memory=memory,
        on_epoch=lambda progress: stored.append(copy.deepcopy(progress)),
    )
    assert len(stored) == len(straight.history) >= 4
    for progress in stored[::3]:
        again = make_stirred(tasks=3, width=0.03, seed=8)
        course = Learner(sequence, SGD, head=head, seed=0, device=CPU)
        while progress.learned < 3:
            course.learn_task(again, strategy, progress)
        assert same_bits(again.state_dict(), network.state_dict())
        assert progress.history == straight.history
        assert progress.rows == straight.rows
        assert same_bits(progress.memory, straight.memory)


def test_a_task_is_trained_for_its_own_epochs(make_network, make_sequence):
    first, second = make_sequence().tasks
    sequence = replace(make_sequence(), tasks=(replace(first, epochs=3), second))
    learner = Learner(
        sequence, TrainingConfig(epochs=1, batch_size=4), head="multi", seed=0, device=CPU
    )
    progress, network = Progress(0, []), make_network()
    PackNet("multi").learn(learner, network, progress)
    trained = [(row["task"], row["phase"]) for row in progress.history]
    assert trained == [(1, "learn")] * 3 + [(2, "retrain")] * 2 + [(2, "learn")]
    sequence = replace(sequence, tasks=(first, replace(second, epochs=3)))
    lesson = make_lesson(network, sequence, learned=1, config=TrainingConfig(epochs=1))
    for strategy in (Replay("multi"), FragileLayer("multi"), Circuit("multi", ranking=None)):
        assert strategy.phases(lesson)[-1].epochs == 3
    progress = Progress(0, [])
    Joint("multi", passes=2).learn(
        Learner(sequence, TrainingConfig(epochs=1, batch_size=4), head="multi", seed=0, device=CPU),
        make_network(),
        progress,
    )
    assert len(progress.history) == 4  # 2 x the mean of 1 and 3


def test_a_task_is_augmented_in_its_own_way(make_network, make_sequence, monkeypatch):
    """Learned and replayed; what all tasks are augmented by is the least of all."""
    first, second = make_sequence().tasks
    tasks = (first, replace(second, flip=False, padding=0))
    sequence = replace(make_sequence(), tasks=tasks)
    config, seen = TrainingConfig(epochs=1, lr=0.01, batch_size=4, flip=True, padding=3), []
    plain = Batches.epoch

    def epoch(self, *arguments, flip, padding):
        seen.append((flip, padding))
        return plain(self, *arguments, flip=flip, padding=padding)

    monkeypatch.setattr(Batches, "epoch", epoch)
    for strategy in (Replay("multi"), Joint("multi")):
        learner = Learner(sequence, config, head="multi", seed=0, device=CPU)
        strategy.learn(learner, make_network(), Progress(0, []))
    learned, replayed, *_ = seen[1:]
    assert seen[0] == (True, 3)
    assert (learned, replayed) == ((False, 0), (True, 3))
    assert seen[-1] == (False, 0)
