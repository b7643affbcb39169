"""What a whole run takes, told beforehand: counts by hand, times by what a probe measures."""

from dataclasses import replace

import pytest
import torch

from permafrost import estimate as module
from permafrost.estimate import Costs, Estimate, estimate
from permafrost.params import Split
from small_runs import CPU, make_params

# Seconds by which each cost shows in the sum.
COSTS = Costs(start=0.0, step=1.0, measured=0.0, explained=0.0, informed=0.0, pictures=0.0)


@pytest.fixture
def in_project(tmp_path, monkeypatch):
    """Return a function that estimates with given costs, or with a probe's."""
    monkeypatch.setattr(module, "project_root", lambda: tmp_path)

    def run(params, sequence, costs=None):
        if costs:
            monkeypatch.setattr(module, "_costs", lambda *_: costs)
        return estimate(params, sequence, CPU)

    return run


def test_trainings_and_steps_by_hand(in_project, make_sequence):
    """Two classes of four images in batches of four: two steps an epoch."""
    params = make_params(
        seeds=[0, 1],
        sweep={
            "strategies": ["finetune", "freeze", "joint", "packnet", "critical_layer"],
            "metrics": ["mse", "random"],
            "pcts": [0.25, 0.5],
            "heads": ["multi"],
            "workers": 1,
        },
        split={"classes_per_task": 2, "tasks": 3, "validation": 0.2},
        tune={"freeze": [{"pct": 0.5}, {"pct": 0.75}], "packnet": [{"prune": 0.5}]},
        freeze={"pct": 0.25},
        model={"head": "multi"},
    )
    found = in_project(params, make_sequence(tasks=3), COSTS)
    # Per seed: the first task, finetune, 2 metrics x (2 shares, one of them the chosen), joint
    # under two heads in two lengths, packnet, critical_layer; the variant is one of them.
    assert found.trainings == 2 * (1 + 1 + 4 + 4 + 1 + 1) + 2  # two trials
    task = 2 * 2  # steps of two epochs
    plain, joint = 2 * task, 2 * 3 * task * (1 + 3)  # 24 images are six batches
    packnet = 2 * (task + task // 2)
    per_seed = task + plain + 4 * plain + joint + packnet + 2 * plain
    assert found.steps == 2 * per_seed + 2 * plain
    assert found.seconds == found.steps  # no method here is costlier than its steps


def test_a_task_with_epochs_of_its_own(in_project, make_sequence):
    params = make_params(seeds=[0], sweep={"strategies": ["finetune", "joint"], "workers": 1})
    plain = in_project(params, make_sequence(), COSTS).steps
    first, second = make_sequence().tasks
    listed = [{"classes": list(task.classes), "epochs": n} for task, n in ((first, 4), (second, 6))]
    params = params.model_copy(update={"split": Split(tasks=listed)})
    sequence = replace(make_sequence(), tasks=(replace(first, epochs=4), replace(second, epochs=6)))
    # Two epochs become four and six: the first task, the second in two runs, joint's mean.
    assert plain == 4 * (1 + 2) + 2 * 2 * 4 * (1 + 2)
    assert in_project(params, sequence, COSTS).steps == 8 + 2 * 12 + 2 * 5 * 4 * (1 + 2)


@pytest.mark.parametrize(
    ("costs", "strategies", "expected"),
    [
        ({"start": 1.0}, ["finetune"], 1.5 * (8 + 6)),
        # Two epochs of the first task's three images a class; two more of both tasks', twice.
        ({"measured": 1.0}, ["finetune"], 2 * 6 + 2 * 2 * 12),
        ({"explained": 1.0, "pictures": 100.0}, ["finetune"], 8 + 100),
        ({"informed": 1.0}, ["finetune"], 0),
        ({"informed": 1.0}, ["ewc"], 8),
        ({"step": 1.0}, ["replay"], 4 + 4 + 2 * 4),
    ],
)
def test_each_cost_enters_as_often_as_it_is_paid(
    in_project, make_sequence, costs, strategies, expected
):
    params = make_params(
        sweep={"strategies": strategies, "metrics": ["mse"], "pcts": [0.5], "workers": 1},
        rank={"metrics": ["mse"]},
        tune={"ewc": [{"strength": 1}]},
    )
    free = Costs(**dict.fromkeys(Costs.__dataclass_fields__, 0.0))
    found = in_project(params, make_sequence(), Costs(**{**vars(free), **costs}))
    assert found.seconds == pytest.approx(expected)


def test_later_tasks_are_explained_anew(in_project, make_sequence):
    sweep = {"strategies": ["freeze"], "metrics": ["mse"], "pcts": [0.25, 0.5], "workers": 1}
    params = make_params(sweep=sweep, tune={"freeze": [{"pct": 0.5}]}, freeze={"pct": 0.25})
    costs = Costs(0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    two, four = (in_project(params, make_sequence(tasks=n), costs).seconds for n in (2, 4))
    assert four - two == 2 * 2  # the variant and the chosen share


def test_workers_share_the_sweep(in_project, make_sequence, monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(4), raising=False)
    sweep = {"strategies": ["finetune"], "metrics": [], "pcts": []}
    seconds = {
        (workers, threads): in_project(
            make_params(sweep={**sweep, "workers": workers}, runtime={"threads": threads}),
            make_sequence(),
            COSTS,
        ).seconds
        for workers, threads in ((1, 1), (2, 1), (8, 2), (2, 4))
    }
    alone = 4 + 4  # the first task, and the variant
    assert seconds == {(1, 1): alone + 4, (2, 1): alone + 2, (8, 2): alone + 2, (2, 4): alone + 4}


def test_the_probe_times_each_cost_once(in_project, make_sequence, monkeypatch):
    params = make_params(sweep={"strategies": ["ewc"], "metrics": [], "pcts": []})
    calls, probe = [], module._probe

    def counting(*arguments):
        calls.append(probe(*arguments))
        return calls[-1]

    monkeypatch.setattr(module, "_probe", counting)
    before = torch.get_rng_state()
    first, second = (in_project(params, make_sequence()) for _ in range(2))
    assert first == second
    assert len(calls) == 1
    assert all(value > 0 for value in vars(calls[0]).values())
    assert torch.equal(torch.get_rng_state(), before)
    in_project(make_params(model={"width": 0.1}), make_sequence())
    assert len(calls) == 2


def test_disk_by_hand(in_project, make_sequence):
    """Of the demo's form: the larger the network, the more; images of zeros are counted."""
    sweep = {"strategies": ["finetune"], "metrics": [], "pcts": []}
    small, large = (
        in_project(make_params(model={"width": w}, sweep=sweep), make_sequence(), COSTS).megabytes
        for w in (0.05, 0.2)
    )
    weights = {w: _megabytes(w) for w in (0.05, 0.2)}
    assert large - small > 8 * (weights[0.2] - weights[0.05])


def _megabytes(width):
    from permafrost.experiment import new_network

    network = new_network(make_params(model={"width": width}), 0)
    return sum(value.nbytes for value in network.state_dict().values()) / 1e6


@pytest.mark.parametrize(
    ("seconds", "shown"), [(5, "5 seconds"), (200, "3 minutes"), (9000, "2.5 hours")]
)
def test_it_is_told_in_a_line(seconds, shown):
    line = str(Estimate(3, 12_000, {"split@0": 1.0, "sweep": seconds - 1}, 1234.5))
    assert f"3 trainings, 12,000 steps, about {shown} and 1,234 MB" in line
