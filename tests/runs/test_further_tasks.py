"""Trainings of further tasks: resumed to the same bits, recorded, ranked anew, and failed."""

import dataclasses

import pytest
import torch

from permafrost.artifacts import file_digest
from permafrost.errors import InputError, NotFiniteError
from permafrost.experiment import RunInputs, knowledge_name, new_network, train_run
from permafrost.models import HEADS
from permafrost.ranking import CONTROLS, RESPONSES, method
from permafrost.ranking.method import frozen_masks
from permafrost.runs import further_tasks
from permafrost.runs.spec import RunSpec
from permafrost.runs.store import with_row
from permafrost.strategies import STRATEGIES, ranked
from permafrost.tensors import load_tensors
from small_runs import (
    CPU,
    EWC,
    FINETUNE,
    FREEZE,
    LWF,
    MASKS,
    REPLAY,
    as_json,
    cell_of,
    make_inputs,
    make_joint,
    make_knowledge,
    make_orders,
    make_params,
    unread,
)

# How many epochs a task's training has, if it is not two.
EPOCHS = {"packnet": 1 + 2, "critical_layer": 2 + 2, "joint": 2 * 2}


@pytest.mark.parametrize(
    "spec",
    [
        FREEZE,
        make_joint(0, "multi", 2),
        EWC,
        RunSpec("packnet", 0, "multi", hyper=(("prune", 0.5),)),
        RunSpec("critical_layer", 0, "shared"),
        dataclasses.replace(FREEZE, strategy="freeze_lwf", hyper=LWF.hyper),
    ],
    ids=lambda spec: spec.name,
)
@pytest.mark.parametrize(("optimizer", "last"), [("sgd", 1), ("adam", 2)])
def test_a_killed_cell_goes_on_to_the_same_bits(make_store, informed, spec, optimizer, last):
    params = make_params(train={"optimizer": optimizer})
    masks = MASKS if spec.metric else None
    whole, killed = make_store("whole"), make_store("killed")
    record = train_run(whole, params, spec, informed, masks, CPU)
    epochs = []

    def kill(progress):
        epochs.append(len(progress.history) + progress.training.epoch)
        if epochs[-1] == last and not killed.tracker.runs[1:]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(killed, params, spec, informed, masks, CPU, kill)
    folder = killed.folder / record["key"]
    assert [path.name for path in folder.iterdir()] == ["checkpoint.safetensors"]
    assert killed.load(record["key"]) is None
    again = train_run(killed, params, spec, informed, masks, CPU, kill)
    assert epochs == list(range(1, EPOCHS.get(spec.strategy, 2) + 1))  # no epoch twice
    assert as_json(again) == as_json(record)
    key = record["key"]
    assert file_digest(killed.model_path(key)) == file_digest(whole.model_path(key))
    assert sorted(path.name for path in folder.iterdir()) == [
        "cell.json",
        "kept.safetensors",
        "model.safetensors",
    ]
    # The second run of the tracker holds the whole curve, each epoch once.
    first, second = killed.tracker.runs
    assert (first.steps, first.result) == (epochs[:last], None)
    assert second.steps == epochs
    assert second.result == whole.tracker.runs[0].result


def test_the_record_of_a_cell(store, inputs):
    params = make_params()
    record = train_run(store, params, FREEZE, inputs, MASKS, CPU)
    assert as_json(with_row(store.load(record["key"]))) == as_json(record)
    row = record["row"]
    assert len(row["R"]) == 3
    assert [row["acc_task1"], row["acc_task2"]] == row["R"][2]
    assert [row["acc_task1_before"], row["acc_task2_before"]] == row["R"][1]
    assert [row["acc_task1_init"], row["acc_task2_init"]] == row["R"][0]
    assert row["acc_mean"] == sum(row["R"][2]) / 2
    assert row["forgetting"] == row["R"][1][0] - row["R"][2][0]
    assert {name: row[name] for name in ("strategy", "metric", "pct", "seed", "head")} == {
        "strategy": "freeze",
        "metric": "mse",
        "pct": 0.5,
        "seed": 0,
        "head": "shared",
    }
    assert (row["saliency"], row["aggregate"], row["status"]) == ("fullgrad", "union", "done")
    assert list(record["drift"]) == list(MASKS)
    assert record["drift"]["features.0"]["frozen"] == 0  # nothing moves before the first layer
    assert record["drift"]["features.0"]["live"] > 0
    assert row["drift_frozen"] > 0
    # The frozen filters are the first task's.
    weights, _ = load_tensors(store.model_path(record["key"]))
    for name, mask in MASKS.items():
        moved = (weights[f"{name}.weight"] != inputs.first[f"{name}.weight"]).flatten(1).any(1)
        assert torch.equal(moved, ~mask)


def test_what_never_froze_and_what_froze_all(store, inputs):
    record = train_run(store, make_params(), FINETUNE, inputs, None, CPU)
    assert record["row"]["drift_frozen"] is None
    assert record["row"]["drift_live"] > 0
    assert record["row"]["saliency"] is None
    probe = RunSpec("linear_probe", 0, "shared")
    record = train_run(store, make_params(), probe, inputs, None, CPU)
    assert record["row"]["drift_frozen"] == 0
    assert record["row"]["drift_live"] is None
    joint = make_joint(0, "expanding", 1)
    record = train_run(store, make_params(), joint, inputs, None, CPU)
    assert record["row"]["R"][1] == [None, None]
    assert record["row"]["hyper"] == {"passes": 1}
    assert record["row"]["forgetting"] is None
    assert record["row"]["memory_bytes"] == inputs.tasks.tasks[0].train.images.nbytes


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_has_a_cell(store, informed, strategy):
    spec = cell_of(strategy)
    assert spec.strategy == strategy
    masks = None if spec.metric is None else make_orders()
    masks = masks if spec.pct is None else frozen_masks(masks, spec.pct)
    record = train_run(store, make_params(), spec, informed, masks, CPU)
    row = record["row"]
    assert as_json(with_row(store.load(record["key"]))) == as_json(record)
    assert (record["kind"], row["status"], row["strategy"]) == ("cell", "done", strategy)
    assert row["hyper"] == spec.hyperparameters
    assert [row["acc_task1"], row["acc_task2"]] == row["R"][2]
    holds_nothing = strategy in ("finetune", "linear_probe")
    assert (row["memory_bytes"] == 0) == holds_nothing
    assert ("acc_task1_pruned" in row) == (strategy in ("packnet", "edges"))
    assert ("drift" in record) == (strategy != "joint")
    shown = store.tracker.runs[0].result
    assert shown.experiment == "permafrost"
    assert {name: shown.params[name] for name in spec.hyperparameters} == spec.hyperparameters
    assert len(shown.curves) == len(record["history"])
    # The epochs' seconds are the cell's; measuring does not count.
    assert store.seconds(record["key"]) > 0


def test_what_a_strategy_keeps(store, informed):
    """In bytes: while the last task is learned, besides the network."""
    weights = sum(
        parameter.nbytes
        for name, parameter in new_network(make_params(), 0).named_parameters()
        if not name.startswith("heads.1.")
    )
    convolutions = sum(
        layer.weight.numel()
        for layer in new_network(make_params(), 0).modules()
        if isinstance(layer, torch.nn.Conv2d)
    )
    tasks = informed.tasks.tasks
    frozen = sum(len(mask) for mask in MASKS.values())  # a byte each
    keep = make_params(consolidate={"buffer_images": 3})
    known = make_knowledge(keep, informed.tasks, new_network(keep, 0))
    small = dataclasses.replace(informed, read_knowledge=lambda: known)
    for spec, masks, inputs, expected in (
        (EWC, None, informed, 2 * weights),  # precisions and centres
        (cell_of("si"), None, informed, 2 * weights),
        (LWF, None, informed, len(tasks[1].train) * 2 * 4),  # two logits of each image
        (REPLAY, None, informed, len(tasks[0].train) * (3 * 32 * 32 + 8)),
        (REPLAY, None, small, 3 * (3 * 32 * 32 + 8)),
        (cell_of("packnet", "multi"), None, informed, convolutions + 1),  # a byte each
        (FREEZE, MASKS, informed, frozen),
        (
            dataclasses.replace(FREEZE, strategy="freeze_ewc", hyper=EWC.hyper),
            MASKS,
            informed,
            2 * weights + frozen,
        ),
    ):
        record = train_run(store, make_params(), spec, inputs, masks, CPU)
        assert record["row"]["memory_bytes"] == expected, spec.name


def test_a_strategy_reads_its_own_part_of_what_is_known(store, informed):
    """Replay is given the buffer only, and draws from it."""
    known = informed.read_knowledge()
    mine = knowledge_name(STRATEGIES["replay"])
    others = {name: value for name, value in known.items() if name.startswith(f"{mine}/")}
    alone = dataclasses.replace(informed, read_knowledge=lambda: others)
    record = train_run(store, make_params(), REPLAY, alone, None, CPU)
    assert train_run(store, make_params(), REPLAY, informed, None, CPU) == record
    other = {name: value.flip(0) for name, value in others.items() if "images" in name}
    changed = dataclasses.replace(informed, read_knowledge=lambda: others | other)
    again = train_run(store, make_params(), REPLAY, changed, None, CPU)
    assert again["history"] != record["history"]


def test_the_accuracy_after_pruning(store, inputs):
    params = make_params(train={"epochs": 3})
    spec = RunSpec("packnet", 0, "multi", hyper=(("prune", 0.5),))
    record = train_run(store, params, spec, inputs, None, CPU)
    row, history = record["row"], record["history"]
    assert [(epoch["phase"], epoch["epoch"]) for epoch in history] == [
        ("retrain", 1),
        ("retrain", 2),
        ("learn", 1),
        ("learn", 2),
        ("learn", 3),
    ]
    assert row["acc_task1_pruned"] == history[1]["acc_task1"]
    # From then on the first task's answers stay, bit for bit.
    assert {epoch["acc_task1"] for epoch in history[2:]} == {row["acc_task1_pruned"]}
    assert row["acc_task1"] == row["acc_task1_pruned"]


def test_the_accuracy_of_every_task_after_its_pruning(store, make_sequence):
    params = make_params(split={"tasks": 4})
    inputs = make_inputs(params, make_sequence(tasks=4))
    spec = RunSpec("packnet", 0, "multi", hyper=(("prune", 0.5),))
    record = train_run(store, params, spec, inputs, None, CPU)
    row, history = record["row"], record["history"]
    for task in (1, 2, 3):
        (pruned,) = (e for e in history if e["phase"] == "retrain" and e["task"] == task + 1)
        assert row[f"acc_task{task}_pruned"] == pruned[f"acc_task{task}"] == row[f"acc_task{task}"]
    assert "acc_task4_pruned" not in row


# Failed trainings.


def test_a_training_that_diverges_is_a_failed_cell(store, inputs):
    params = make_params(train={"lr": 10.0, "epochs": 8}, model={"batch_norm": False})
    first = {name: 1e3 * value for name, value in new_network(params, 0).state_dict().items()}
    inputs = dataclasses.replace(inputs, first=first)
    record = train_run(store, params, FINETUNE, inputs, None, CPU)
    row = record["row"]
    assert row["status"] == "failed"
    assert "train.lr=10.0" in row["error"]
    assert (row["key"], row["strategy"], row["seed"]) == (record["key"], "finetune", 0)
    assert "R" not in row
    assert "acc_mean" not in row
    assert as_json(with_row(store.load(record["key"]))) == as_json(record)
    again = train_run(store, params, FINETUNE, inputs, None, CPU)
    assert as_json(again) == as_json(record)
    assert len(store.tracker.runs) == 1


def test_a_training_whose_drift_is_not_finite_is_a_failed_cell(store, inputs, monkeypatch):
    """What was trained before is told: its epochs, and how long they took."""

    def overflow(*_):
        raise NotFiniteError("a response of layer features.0 is not finite")

    monkeypatch.setattr(further_tasks, "response_drift", overflow)
    record = train_run(store, make_params(), FINETUNE, inputs, None, CPU)
    assert (record["row"]["status"], "R" in record["row"]) == ("failed", False)
    assert record["row"]["error"] == "a response of layer features.0 is not finite"
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    assert store.seconds(record["key"]) > 0


# Ranked anew.


def train_ranked(store, sequence, criterion, head="multi", pct=0.5):
    """Train a run whose filters are ranked anew; return its record and the first weights."""
    tasks = len(sequence.tasks)
    params = make_params(
        split={"tasks": tasks},
        model={"width": 0.02},
        train={"epochs": 1},
        visualize={"steps": 1},
        rank={"metrics": [criterion]},
        freeze={"metric": criterion},
        sweep={"metrics": [criterion]},
    )
    inputs = make_inputs(params, sequence)
    masks = frozen_masks(make_orders(params), pct)
    spec = RunSpec("freeze", 0, head, criterion, pct)
    return train_run(store, params, spec, inputs, masks, CPU), inputs.first


OWN = "custom.centre_distance:centre_distance"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("criterion", ["mse", *CONTROLS, *RESPONSES, OWN])
def test_every_criterion_ranks_anew(store, make_sequence, criterion, head):
    record, _ = train_ranked(store, make_sequence(tasks=3), criterion, head)
    row = record["row"]
    assert (row["status"], row["metric"]) == ("done", criterion)
    assert [row[f"acc_task{task}"] for task in (1, 2, 3)] == row["R"][3]


def test_incomplete_maps_rank_no_further_task(store, make_sequence, monkeypatch):
    monkeypatch.setattr(method, "COMPLETENESS_BOUND", 0)
    with pytest.raises(InputError, match=r"^saliency\.method: fullgrad's terms miss the logit"):
        train_ranked(store, make_sequence(tasks=3), "mse")
    record, _ = train_ranked(store, make_sequence(tasks=3), "taylor")  # it looks at no map
    assert record["row"]["status"] == "done"


def test_four_tasks_with_no_filter_left_to_train(store, make_sequence):
    record, first = train_ranked(store, make_sequence(tasks=4), "taylor", pct=1.0)
    assert [len(line) for line in record["row"]["R"]] == [4] * 5
    assert [epoch["task"] for epoch in record["history"]] == [2, 3, 4]
    after, _ = load_tensors(store.model_path(record["key"]))
    body = {name: value for name, value in after.items() if not name.startswith("heads.")}
    assert all(torch.equal(value, first[name]) for name, value in body.items())
    heads = [name for name in after if name.startswith("heads.") and name[6] != "0"]
    assert not any(torch.equal(after[name], first[name]) for name in heads)


@pytest.mark.parametrize("head", ["shared", "expanding"])
def test_a_third_task_ranks_anew(store, make_sequence, monkeypatch, head):
    params = make_params(
        split={"tasks": 3},
        model={"width": 0.01},
        train={"epochs": 1},
        visualize={"steps": 1},
    )
    first = new_network(params, 0).state_dict()
    inputs = RunInputs(make_sequence(tasks=3), "tasks", first, "first", unread)
    asked = []

    def rank(view, batches, classes, *rest):
        asked.append((view(batches.images[:2] / 255).shape[1], classes, batches))
        return original(view, batches, classes, *rest)

    original = ranked.rank_network
    monkeypatch.setattr(ranked, "rank_network", rank)
    spec = RunSpec("freeze", 0, head, "mse", 0.5)
    masks = frozen_masks(make_orders(params), 0.5)
    record = train_run(store, params, spec, inputs, masks, CPU)
    ((outputs, classes, batches),) = asked  # before task 3; the first masks were given
    assert (outputs, classes) == (2, 2)  # the task's own outputs
    assert torch.equal(batches.images, inputs.tasks.tasks[1].train.images)
    assert len(record["row"]["R"]) == 4
    assert [row["task"] for row in record["history"]] == [2, 3]
