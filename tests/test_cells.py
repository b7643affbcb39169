"""Cells: trained once, resumed to the same bits, and keyed by all that they depend on."""

import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from permafrost import cells, registry
from permafrost.artifacts import file_digest, load_tensors, save_record, save_tasks, save_tensors
from permafrost.cells import CellRequest, run_record, with_row
from permafrost.errors import InputError, NotFiniteError
from permafrost.evaluation import Accuracy
from permafrost.experiment import (
    CellInputs,
    first_lesson,
    knowledge_name,
    new_network,
    train_cell,
    train_first_task,
)
from permafrost.machine import fingerprint, machine_identity
from permafrost.models import HEADS
from permafrost.params import Params
from permafrost.plan import CellSpec, grids, method_cell, sweep_cells
from permafrost.ranking import CONTROLS, RESPONSES, method
from permafrost.ranking.method import frozen_masks
from permafrost.runs import further_tasks, key
from permafrost.runs.outcome import Outcome, accuracy_facts
from permafrost.runs.rows import further_row, row_accuracies
from permafrost.strategies import STRATEGIES, Progress, common_parameters, ranked
from permafrost.training import TrainingState

CPU = torch.device("cpu")


@pytest.fixture
def store(make_store):
    return make_store()


def make_params(**sections):
    values = {
        "seeds": [0],
        "split": {"classes_per_task": 2},
        "model": {"arch": "vgg11", "width": 0.05},
        "train": {"epochs": 2, "lr": 0.01, "batch_size": 4},
    }
    for name, section in sections.items():
        old = values.get(name)
        values[name] = {**old, **section} if isinstance(old, dict) else section
    return Params.model_validate(values)


def unread():
    raise AssertionError("what stage consolidate wrote was read")


@pytest.fixture
def inputs(make_sequence):
    """Return inputs without what stage consolidate writes."""
    first = new_network(make_params(), 0).state_dict()
    return CellInputs(make_sequence(validation=2), "tasks", first, "first", unread)


def make_knowledge(params, sequence, network):
    """Return what stage consolidate writes."""
    watched = common_parameters(network, "shared", 1)
    integral = {name: torch.full_like(value, 0.01) for name, value in watched.items()}
    lesson = first_lesson(params, 0, sequence, network, integral, CPU)
    made = {knowledge_name(strategy): strategy.knowledge for strategy in STRATEGIES.values()}
    return {
        f"{name}/{entry}": value.contiguous()
        for name, make in made.items()
        if make is not None
        for entry, value in make(lesson).items()
    }


@pytest.fixture
def informed(inputs):
    """Return inputs with what stage consolidate writes."""
    network = new_network(make_params(), 0)
    known = make_knowledge(make_params(), inputs.tasks, network)
    return dataclasses.replace(inputs, read_knowledge=lambda: known)


def make_orders(params=None):
    network = new_network(params or make_params(), 0)
    return {
        f"features.{index}": torch.arange(layer.out_channels).flip(0)
        for index, layer in enumerate(network.features)
        if isinstance(layer, torch.nn.Conv2d)
    }


MASKS = frozen_masks(make_orders(), 0.5)
FREEZE = CellSpec("freeze", 0, "shared", "mse", 0.5)
FINETUNE = CellSpec("finetune", 0, "shared")
EWC = CellSpec("ewc", 0, "shared", hyper=(("strength", 3.0),))
LWF = CellSpec("lwf", 0, "shared", hyper=(("temperature", 2.0), ("weight", 0.5)))
REPLAY = CellSpec("replay", 0, "shared")


def make_joint(seed, head, passes):
    return CellSpec("joint", seed, head, hyper=(("passes", passes),))


def chosen_for(params):
    """Return the first entry of what is tried, as stage tune writes it."""
    first = {name: grid[0] for name, grid in grids(params).items()}
    return dict.fromkeys(params.sweep.heads, first)


def as_json(record):
    return json.loads(json.dumps(record))


def never(progress, on_epoch):
    raise AssertionError("trained again")


REQUEST = CellRequest("cell", "a cell", {"seed": 0}, {"seed": 0}, (), {"strategy": "none"})


FILTERS = {"filters": {"a": 4, "b": 6}, "frozen": {"b": 3}}


def facts(correct=1):
    """Return what one task of two images, learned by nothing, would be measured as."""
    rows = [[Accuracy((0,), (2,))], [Accuracy((correct,), (2,))]]
    return accuracy_facts(Progress(1, rows)) | {"memory_bytes": 0} | FILTERS


def trivial(progress, on_epoch):
    return Outcome(facts(), {"weight": torch.ones(3)}, 1.5, {"kept": torch.zeros(2)})


# The store, with a training that does nothing.


def test_a_cell_is_trained_once(store):
    record = store.obtain(REQUEST, trivial)
    stored = {
        "key": REQUEST.key,
        "kind": "cell",
        "name": "a cell",
        "params": {"seed": 0},
        "about": {"strategy": "none"},
    } | facts()
    assert record == with_row(stored)
    assert {name: record["row"][name] for name in ("key", "strategy", "acc_task1")} == {
        "key": REQUEST.key,
        "strategy": "none",
        "acc_task1": 0.5,
    }
    assert store.obtain(REQUEST, never) == record
    assert store.load(REQUEST.key) == stored
    assert [store.load(key) for key in store.stored_keys()] == [stored]
    assert store.stored_keys() == [REQUEST.key]
    assert store.seconds(REQUEST.key) == 1.5
    assert load_tensors(store.model_path(REQUEST.key))[0]["weight"].tolist() == [1, 1, 1]
    assert load_tensors(store.kept_path(REQUEST.key))[0]["kept"].tolist() == [0, 0]
    assert len(store.tracker.runs) == 1
    assert store.tracker.runs[0].result == run_record(record, fingerprint())


def test_a_record_of_an_older_version_can_still_be_logged(store):
    old = {"key": "k", "kind": "cell", "name": "n", "params": {}, "row": {"acc_mean": 0.5}}
    assert run_record(old | {"history": []}, {}).metrics == {"acc_mean": 0.5}


def test_an_unknown_cell(store):
    assert store.load("0" * 32) is None
    assert store.run_records() == store.stored_keys() == []
    assert not store.is_active("0" * 32)


def test_fresh_ignores_what_is_stored(store, monkeypatch):
    store.obtain(REQUEST, trivial)
    monkeypatch.setenv("PERMAFROST_FRESH", "1")
    given = []

    def other(progress, on_epoch):
        given.append(progress)
        return Outcome(facts(2), {"weight": torch.zeros(3)}, 0.0)

    assert store.obtain(REQUEST, other)["row"]["acc_task1"] == 1
    assert given == [None]
    for off in ("", "0"):
        monkeypatch.setenv("PERMAFROST_FRESH", off)
        assert store.obtain(REQUEST, never)["row"]["acc_task1"] == 1


def test_fresh_forgets_what_was_stored(store, monkeypatch):
    """Killed before the first epoch, it may not leave the old result beside a new run in MLflow."""
    store.obtain(REQUEST, trivial)
    monkeypatch.setenv("PERMAFROST_FRESH", "1")
    with pytest.raises(ZeroDivisionError):
        store.obtain(REQUEST, lambda progress, on_epoch: 1 / 0)
    assert store.load(REQUEST.key) is None


def test_fresh_ignores_a_checkpoint_too(store, monkeypatch):
    def killed(progress, on_epoch):
        on_epoch(Progress(1, []))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.obtain(REQUEST, killed)
    monkeypatch.setenv("PERMAFROST_FRESH", "1")
    given = []
    store.obtain(REQUEST, lambda progress, on_epoch: (given.append(progress), trivial(0, 0))[1])
    assert given == [None]


@pytest.mark.parametrize("file", ["model_path", "kept_path"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_weights_are_named_and_made_again(store, capsys, damage, file):
    record = store.obtain(REQUEST, trivial)
    path = getattr(store, file)(REQUEST.key)
    whole = path.read_bytes()
    content = bytearray(whole)
    if damage == "missing":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content[:-1] if damage == "truncated" else content)
    with pytest.raises(InputError, match=str(path)):
        store.load(REQUEST.key)
    assert store.obtain(REQUEST, trivial) == record
    message = capsys.readouterr().err
    assert message.startswith(f"{path}: ")
    assert message.endswith("; it is made again\n")
    assert path.read_bytes() == whole
    assert store.obtain(REQUEST, never) == record


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"record": {}, "seconds": 0}'])
def test_a_damaged_record_is_named_and_made_again(store, capsys, content):
    record = store.obtain(REQUEST, trivial)
    path = store.folder / REQUEST.key / "cell.json"
    path.write_bytes(content)
    assert store.obtain(REQUEST, trivial) == record
    assert str(path) in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_the_training_begins_anew(store, capsys):
    checkpoint = store.folder / REQUEST.key / "checkpoint.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"nothing")
    given = []
    store.obtain(REQUEST, lambda progress, on_epoch: (given.append(progress), trivial(0, 0))[1])
    assert given == [None]
    assert str(checkpoint) in capsys.readouterr().err


def test_a_cell_that_was_killed_before_its_run_ended(store, monkeypatch):
    """Its checkpoint goes once it is asked for; `permafrost track` ends its run."""

    def killed(progress, on_epoch):
        on_epoch(Progress(1, []))
        return trivial(progress, on_epoch)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_drop_checkpoint", lambda key: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.obtain(REQUEST, killed)
    folder = store.folder / REQUEST.key
    assert (folder / "checkpoint.safetensors").exists()
    store.obtain(REQUEST, never)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["cell.json", "kept.safetensors", "model.safetensors"]


def test_a_cell_without_its_record_is_not_whole(store):
    """The record is written last; a training killed just before it is not taken for done."""
    store.obtain(REQUEST, trivial)
    (store.folder / REQUEST.key / "cell.json").unlink()
    assert store.load(REQUEST.key) is None
    assert store.run_records() == []
    assert store.stored_keys() == [REQUEST.key]


def test_the_record_is_written_last(store, monkeypatch):
    monkeypatch.setattr(cells, "save_tensors", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.obtain(REQUEST, trivial)
    assert store.load(REQUEST.key) is None


def test_delete(store):
    other = dataclasses.replace(REQUEST, identity={"seed": 1})
    store.obtain(REQUEST, trivial)
    store.obtain(other, trivial)
    folder = store.folder / REQUEST.key
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert store.delete(REQUEST.key) == size > 0
    assert not folder.exists()
    assert store.stored_keys() == [other.key]
    assert store.load(other.key) is not None


def train_until_told(store, started, go_on):
    """In another process: hold a cell."""

    def train(progress, on_epoch):
        started.set()
        go_on.wait(30)
        return trivial(progress, on_epoch)

    store.obtain(REQUEST, train)


def test_a_cell_that_another_process_trains(store):
    context = multiprocessing.get_context("fork")
    started, go_on = context.Event(), context.Event()
    process = context.Process(target=train_until_told, args=(store, started, go_on))
    process.start()
    try:
        assert started.wait(30)
        assert store.is_active(REQUEST.key)
        assert not store.is_active("0" * 32)
        (store.folder / REQUEST.key).mkdir(parents=True)
        assert store.delete(REQUEST.key) is None
        assert store.stored_keys() == [REQUEST.key]
        go_on.set()
        # It waits for the other process and takes what that one stored.
        assert store.obtain(REQUEST, never)["row"]["acc_task1"] == 0.5
        assert not store.is_active(REQUEST.key)
    finally:
        go_on.set()
        process.join(30)
    assert process.exitcode == 0


def test_a_failed_training_lets_go_of_its_cell(store):
    with pytest.raises(ZeroDivisionError):
        store.obtain(REQUEST, lambda progress, on_epoch: 1 / 0)
    assert not store.is_active(REQUEST.key)
    assert store.tracker.runs[0].result is None
    assert store.obtain(REQUEST, trivial)["row"]["acc_task1"] == 0.5


# The store, with trainings.


# How many epochs a task's training has, if it is not two.
EPOCHS = {"packnet": 1 + 2, "critical_layer": 2 + 2, "joint": 2 * 2}


@pytest.mark.parametrize(
    "spec",
    [
        FREEZE,
        make_joint(0, "multi", 2),
        EWC,
        CellSpec("packnet", 0, "multi", hyper=(("prune", 0.5),)),
        CellSpec("critical_layer", 0, "shared"),
        dataclasses.replace(FREEZE, strategy="freeze_lwf", hyper=LWF.hyper),
    ],
    ids=lambda spec: spec.name,
)
@pytest.mark.parametrize(("optimizer", "last"), [("sgd", 1), ("adam", 2)])
def test_a_killed_cell_goes_on_to_the_same_bits(make_store, informed, spec, optimizer, last):
    params = make_params(train={"optimizer": optimizer})
    masks = MASKS if spec.metric else None
    whole, killed = make_store("whole"), make_store("killed")
    record = train_cell(whole, params, spec, informed, masks, CPU)
    epochs = []

    def kill(progress):
        epochs.append(len(progress.history) + progress.training.epoch)
        if epochs[-1] == last and not killed.tracker.runs[1:]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_cell(killed, params, spec, informed, masks, CPU, kill)
    folder = killed.folder / record["key"]
    assert [path.name for path in folder.iterdir()] == ["checkpoint.safetensors"]
    assert killed.load(record["key"]) is None
    again = train_cell(killed, params, spec, informed, masks, CPU, kill)
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


def test_the_training_is_given_its_progress(store, inputs):
    """What a checkpoint holds comes back: rows, weights, history, matrix."""
    progress = Progress(
        learned=2,
        rows=[None, [Accuracy((1, 3), (4, 4)), None]],
        start={"a/b": torch.ones(2)},
        training=TrainingState(3, {"model/a": torch.arange(3)}, [{"epoch": 3, "loss": 0.1}], 2.5),
        history=[{"task": 2, "phase": "trial", "epoch": 1}],
        memory={"owner/a": torch.tensor([0, 7], dtype=torch.uint8), "b": torch.ones(1).bool()},
        phase=1,
        seconds=3.25,
    )
    given = []

    def train(known, on_epoch):
        given.append(known)
        if known is None:
            on_epoch(progress)
            raise RuntimeError("killed")
        return trivial(known, on_epoch)

    with pytest.raises(RuntimeError, match="killed"):
        store.obtain(REQUEST, train)
    store.obtain(REQUEST, train)
    none, known = given
    assert none is None
    assert (known.learned, known.rows, known.history) == (2, progress.rows, progress.history)
    assert (known.training.epoch, known.training.history) == (3, progress.training.history)
    assert torch.equal(known.start["a/b"], torch.ones(2))
    assert torch.equal(known.training.tensors["model/a"], torch.arange(3))
    assert (known.phase, known.seconds, known.training.seconds) == (1, 3.25, 2.5)
    assert set(known.memory) == set(progress.memory)
    for name, value in progress.memory.items():
        assert known.memory[name].dtype == value.dtype
        assert torch.equal(known.memory[name], value)


def test_the_record_of_a_cell(store, inputs):
    params = make_params()
    record = train_cell(store, params, FREEZE, inputs, MASKS, CPU)
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


def test_the_row_is_derived_from_the_matrix():
    matrix = [[0.1, 0.2], [0.9, 0.3], [0.6, 0.8]]
    rows = [[Accuracy((round(10 * v), round(5 * v)), (10, 5)) for v in row] for row in matrix]
    row = further_row(accuracy_facts(Progress(2, rows)) | {"memory_bytes": 7} | FILTERS)
    matrix = [[entry.overall for entry in line] for line in rows]
    assert row["R"] == matrix
    for task in (0, 1):
        name = f"acc_task{task + 1}"
        found = [row[f"{name}_init"], row[f"{name}_before"], row[name]]
        assert found == [line[task] for line in matrix]
    kept, learned = matrix[2]
    assert row["acc_mean"] == pytest.approx((kept + learned) / 2)
    assert row["acc_classes"] == pytest.approx(sum((0.6, 0.6, 0.8, 0.8)) / 4)
    assert row["forgetting"] == -row["bwt"] == pytest.approx(matrix[1][0] - kept)
    assert row["fwt"] == pytest.approx(matrix[1][1] - matrix[0][1])
    assert (row["status"], row["memory_bytes"]) == ("done", 7)
    assert (row["free_filters"], row["free_filters_least"]) == (0.7, 0.5)


def test_what_never_froze_and_what_froze_all(store, inputs):
    record = train_cell(store, make_params(), FINETUNE, inputs, None, CPU)
    assert record["row"]["drift_frozen"] is None
    assert record["row"]["drift_live"] > 0
    assert record["row"]["saliency"] is None
    probe = CellSpec("linear_probe", 0, "shared")
    record = train_cell(store, make_params(), probe, inputs, None, CPU)
    assert record["row"]["drift_frozen"] == 0
    assert record["row"]["drift_live"] is None
    joint = make_joint(0, "expanding", 1)
    record = train_cell(store, make_params(), joint, inputs, None, CPU)
    assert record["row"]["R"][1] == [None, None]
    assert record["row"]["hyper"] == {"passes": 1}
    assert record["row"]["forgetting"] is None
    assert record["row"]["memory_bytes"] == inputs.tasks.tasks[0].train.images.nbytes


def cell_of(strategy, head="shared"):
    """Return a strategy's cell as the sweep has it."""
    params = make_params(sweep={"strategies": [strategy], "heads": [head]})
    return sweep_cells(params, chosen_for(params))[0]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_has_a_cell(store, informed, strategy):
    spec = cell_of(strategy)
    assert spec.strategy == strategy
    masks = None if spec.metric is None else frozen_masks(make_orders(), spec.pct)
    record = train_cell(store, make_params(), spec, informed, masks, CPU)
    row = record["row"]
    assert as_json(with_row(store.load(record["key"]))) == as_json(record)
    assert (record["kind"], row["status"], row["strategy"]) == ("cell", "done", strategy)
    assert row["hyper"] == spec.hyperparameters
    assert [row["acc_task1"], row["acc_task2"]] == row["R"][2]
    holds_nothing = strategy in ("finetune", "linear_probe")
    assert (row["memory_bytes"] == 0) == holds_nothing
    assert ("acc_task1_pruned" in row) == (strategy == "packnet")
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
        record = train_cell(store, make_params(), spec, inputs, masks, CPU)
        assert record["row"]["memory_bytes"] == expected, spec.name


def test_a_strategy_reads_its_own_part_of_what_is_known(store, informed):
    """Replay is given the buffer only, and draws from it."""
    known = informed.read_knowledge()
    mine = knowledge_name(STRATEGIES["replay"])
    others = {name: value for name, value in known.items() if name.startswith(f"{mine}/")}
    alone = dataclasses.replace(informed, read_knowledge=lambda: others)
    record = train_cell(store, make_params(), REPLAY, alone, None, CPU)
    assert train_cell(store, make_params(), REPLAY, informed, None, CPU) == record
    other = {name: value.flip(0) for name, value in others.items() if "images" in name}
    changed = dataclasses.replace(informed, read_knowledge=lambda: others | other)
    again = train_cell(store, make_params(), REPLAY, changed, None, CPU)
    assert again["history"] != record["history"]


def test_the_accuracy_after_pruning(store, inputs):
    params = make_params(train={"epochs": 3})
    spec = CellSpec("packnet", 0, "multi", hyper=(("prune", 0.5),))
    record = train_cell(store, params, spec, inputs, None, CPU)
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
    spec = CellSpec("packnet", 0, "multi", hyper=(("prune", 0.5),))
    record = train_cell(store, params, spec, inputs, None, CPU)
    row, history = record["row"], record["history"]
    for task in (1, 2, 3):
        (pruned,) = (e for e in history if e["phase"] == "retrain" and e["task"] == task + 1)
        assert row[f"acc_task{task}_pruned"] == pruned[f"acc_task{task}"] == row[f"acc_task{task}"]
    assert "acc_task4_pruned" not in row


# Trials.


def test_a_trial_is_measured_on_validation_images(store, inputs):
    validation = inputs.on_validation()
    assert (inputs.kind, validation.kind) == ("cell", "trial")
    for mine, theirs in zip(inputs.tasks.tasks, validation.tasks.tasks, strict=True):
        assert torch.equal(theirs.test.images, mine.validation.images)
        assert torch.equal(theirs.test.labels, mine.validation.labels)
        assert torch.equal(theirs.train.images, mine.train.images)
    cell = train_cell(store, make_params(), FINETUNE, inputs, None, CPU)
    trial = train_cell(store, make_params(), FINETUNE, validation, None, CPU)
    assert (cell["kind"], trial["kind"]) == ("cell", "trial")
    assert cell["key"] != trial["key"]
    runs = [run.result for run in store.tracker.runs]
    assert [run.experiment for run in runs] == ["permafrost", "permafrost-trials"]
    assert [run.tags["kind"] for run in runs] == ["cell", "trial"]
    assert all(torch.__version__.startswith(run.tags["machine.torch"]) for run in runs)
    told = {f"machine.{name}" for name in ("libraries", "cpu", "gpu", "threads", "determinism")}
    assert all(told <= run.tags.keys() for run in runs)
    # One training, measured on other images.
    files = [file_digest(store.model_path(record["key"])) for record in (cell, trial)]
    assert files[0] == files[1]
    losses = [[row["train_loss"] for row in r["history"]] for r in (cell, trial)]
    assert losses[0] == losses[1]
    assert {count for entry in trial["R"][2] for count in entry["count"]} == {2}
    assert train_cell(store, make_params(), FINETUNE, validation, None, CPU) == trial
    assert len(store.tracker.runs) == 2


def test_a_trial_never_sees_the_test_images(store, inputs):
    """Without any, the same comes out."""
    validation = inputs.on_validation()
    tasks = tuple(dataclasses.replace(task, test=task.validation) for task in inputs.tasks.tasks)
    poor = dataclasses.replace(inputs, tasks=dataclasses.replace(inputs.tasks, tasks=tasks))
    one = train_cell(store, make_params(), FREEZE, validation, MASKS, CPU)
    other = train_cell(store, make_params(), FREEZE, poor.on_validation(), MASKS, CPU)
    assert one == other
    everything = store.obtain(
        CellRequest("cell", "poor", {}, {}, ()),
        lambda progress, on_epoch: Outcome(
            train_cell(Through(), make_params(), FREEZE, poor, MASKS, CPU), {}, 0.0
        ),
    )
    assert everything["row"]["R"] == one["row"]["R"]
    assert everything["drift"] == one["drift"]


class Through:
    """Trains at once and stores nothing."""

    def obtain(self, request, train, on_epoch):
        return train(None, lambda progress: None).facts


# Failed trainings.


def test_a_training_that_diverges_is_a_failed_cell(store, inputs):
    params = make_params(train={"lr": 10.0, "epochs": 8}, model={"batch_norm": False})
    first = {name: 1e3 * value for name, value in new_network(params, 0).state_dict().items()}
    inputs = dataclasses.replace(inputs, first=first)
    record = train_cell(store, params, FINETUNE, inputs, None, CPU)
    row = record["row"]
    assert row["status"] == "failed"
    assert "train.lr=10.0" in row["error"]
    assert (row["key"], row["strategy"], row["seed"]) == (record["key"], "finetune", 0)
    assert "R" not in row
    assert "acc_mean" not in row
    assert as_json(with_row(store.load(record["key"]))) == as_json(record)
    again = train_cell(store, params, FINETUNE, inputs, None, CPU)
    assert as_json(again) == as_json(record)
    assert len(store.tracker.runs) == 1


def test_a_training_whose_drift_is_not_finite_is_a_failed_cell(store, inputs, monkeypatch):
    """What was trained before is told: its epochs, and how long they took."""

    def overflow(*_):
        raise NotFiniteError("a response of layer features.0 is not finite")

    monkeypatch.setattr(further_tasks, "response_drift", overflow)
    record = train_cell(store, make_params(), FINETUNE, inputs, None, CPU)
    assert (record["row"]["status"], "R" in record["row"]) == ("failed", False)
    assert record["row"]["error"] == "a response of layer features.0 is not finite"
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    assert store.seconds(record["key"]) > 0


def make_inputs(params, sequence):
    first = new_network(params, 0).state_dict()
    return CellInputs(sequence, "tasks", first, "first", unread)


def train_ranked(store, sequence, criterion, head="multi", pct=0.5):
    """Train a cell whose filters are ranked anew; return its record and the first weights."""
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
    spec = CellSpec("freeze", 0, head, criterion, pct)
    return train_cell(store, params, spec, inputs, masks, CPU), inputs.first


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
    inputs = CellInputs(make_sequence(tasks=3), "tasks", first, "first", unread)
    asked = []

    def rank(view, batches, classes, *rest):
        asked.append((view(batches.images[:2] / 255).shape[1], classes, batches))
        return original(view, batches, classes, *rest)

    original = ranked.rank_network
    monkeypatch.setattr(ranked, "rank_network", rank)
    spec = CellSpec("freeze", 0, head, "mse", 0.5)
    masks = frozen_masks(make_orders(params), 0.5)
    record = train_cell(store, params, spec, inputs, masks, CPU)
    ((outputs, classes, batches),) = asked  # before task 3; the first masks were given
    assert (outputs, classes) == (2, 2)  # the task's own outputs
    assert torch.equal(batches.images, inputs.tasks.tasks[1].train.images)
    assert len(record["row"]["R"]) == 4
    assert [row["task"] for row in record["history"]] == [2, 3]


def test_the_first_task(store, make_sequence):
    params, tasks = make_params(model={"head": "multi"}), make_sequence()
    record = train_first_task(store, params, 0, tasks, "tasks", CPU)
    assert as_json(with_row(store.load(record["key"]))) == as_json(record)
    assert record["kind"] == "first_task"
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    assert record["row"]["acc_task1"] == row_accuracies(record["R"][1])[0].overall
    # The path integral, which one method needs.
    integral, _ = load_tensors(store.kept_path(record["key"]))
    weights, _ = load_tensors(store.model_path(record["key"]))
    assert set(integral) == {
        name
        for name, _ in new_network(params, 0).named_parameters()
        if not name.startswith("heads.1.")  # the first head serves every task where it is shared
    }
    for name, value in integral.items():
        assert value.shape == weights[name].shape
        assert value.isfinite().all()
        assert value.abs().sum() > 0
    assert store.seconds(record["key"]) > 0
    # One first task serves every head mode.
    shared = train_first_task(store, make_params(), 0, tasks, "tasks", CPU)
    assert shared["key"] == record["key"]
    assert len(store.tracker.runs) == 1


@pytest.mark.parametrize(("optimizer", "last"), [("sgd", 1), ("adam", 2)])
def test_a_killed_first_task_goes_on_to_the_same_bits(make_store, make_sequence, optimizer, last):
    """With the path integral, which is recorded on the way."""
    params, tasks = make_params(train={"optimizer": optimizer}), make_sequence()
    whole, killed = make_store("whole"), make_store("killed")
    record = train_first_task(whole, params, 0, tasks, "tasks", CPU)
    epochs = []

    def kill(progress):
        epochs.append(progress.training.epoch)
        if epochs == list(range(1, last + 1)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_first_task(killed, params, 0, tasks, "tasks", CPU, kill)
    again = train_first_task(killed, params, 0, tasks, "tasks", CPU, kill)
    assert epochs == [1, 2]
    assert as_json(again) == as_json(record)
    for path in ("model_path", "kept_path"):
        files = [getattr(store, path)(record["key"]) for store in (whole, killed)]
        assert file_digest(files[0]) == file_digest(files[1])


# Keys.


class Asked(Exception):
    """Carries the key of what was asked for."""


class Catcher:
    def obtain(self, request, train, on_epoch):
        raise Asked(request.key)


def key_of(spec, inputs, masks=MASKS, **sections):
    with pytest.raises(Asked) as caught:
        train_cell(Catcher(), make_params(**sections), spec, inputs, masks, CPU)
    return str(caught.value)


def other_masks():
    masks = {name: mask.clone() for name, mask in MASKS.items()}
    masks["features.0"] = ~masks["features.0"]
    return masks


# The same cell, but for one thing.
CHANGES = {
    "seed": {"spec": dataclasses.replace(FREEZE, seed=1)},
    "strategy": {"spec": FINETUNE, "masks": None},
    "pct": {"spec": dataclasses.replace(FREEZE, pct=0.25)},
    "metric": {"spec": dataclasses.replace(FREEZE, metric="pearson")},
    "head": {"spec": dataclasses.replace(FREEZE, head="multi")},
    "masks": {"masks": other_masks()},
    "lr": {"train": {"lr": 0.02}},
    "epochs": {"train": {"epochs": 3}},
    "optimizer": {"train": {"optimizer": "adam"}},
    "momentum": {"train": {"momentum": 0.5}},
    "weight_decay": {"train": {"weight_decay": 0.1}},
    "batch_size": {"train": {"batch_size": 5}},
    "flip": {"train": {"flip": True}},
    "padding": {"train": {"padding": 2}},
    "arch": {"model": {"arch": "vgg13"}},
    "width": {"model": {"width": 0.06}},
    "model.batch_norm": {"model": {"batch_norm": False}},
    "freeze.batch_norm": {"freeze": {"batch_norm": "affine"}},
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_the_key_changes_with(inputs, name):
    assert key_of(**({"spec": FREEZE, "inputs": inputs} | CHANGES[name])) != key_of(FREEZE, inputs)


def test_the_key_changes_with_the_inputs(inputs, monkeypatch):
    keys = [key_of(FREEZE, inputs)]
    keys.append(key_of(FREEZE, dataclasses.replace(inputs, tasks_digest="others")))
    keys.append(key_of(FREEZE, dataclasses.replace(inputs, first_digest="another")))
    keys.append(key_of(FREEZE, inputs.on_validation()))
    joint = make_joint(0, "shared", 1)
    keys += [key_of(make_joint(0, "shared", passes), inputs, None) for passes in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(key, "code_identity", lambda roots: {"code": "other"})
        keys.append(key_of(FREEZE, inputs))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 64)
        keys.append(key_of(FREEZE, inputs))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        keys.append(key_of(FREEZE, inputs))
    assert len(set(keys)) == len(keys)
    assert key_of(FREEZE, inputs) == keys[0]
    # Joint training does not start from the first task's weights.
    other = dataclasses.replace(inputs, first_digest="another")
    assert key_of(joint, other, None) == key_of(joint, inputs, None)


def test_the_key_changes_with_what_the_strategy_needs(inputs):
    def known(text):
        value = torch.tensor(list(text.encode()))
        names = {knowledge_name(strategy) for strategy in STRATEGIES.values()}
        everything = {f"{name}/values": value for name in names}
        return dataclasses.replace(inputs, read_knowledge=lambda: everything)

    for spec in (EWC, LWF, REPLAY, cell_of("si")):
        assert key_of(spec, known("a"), None) != key_of(spec, known("b"), None)
    for strategy in ("freeze_ewc", "freeze_lwf"):
        spec = dataclasses.replace(FREEZE, strategy=strategy, hyper=cell_of(strategy).hyper)
        assert key_of(spec, known("a")) != key_of(spec, known("b"))
    for spec in (FINETUNE, cell_of("packnet"), cell_of("critical_layer")):
        assert key_of(spec, known("a"), None) == key_of(spec, known("b"), None)
    # Before a third task it is made anew, with as many images.
    for spec in (EWC, REPLAY):
        keys = {
            key_of(spec, known("a"), None, consolidate=section)
            for section in ({}, {"fisher_images": 7}, {"buffer_images": 7})
        }
        assert len(keys) > 1


def test_the_key_changes_with_the_hyperparameters(inputs):
    known = dataclasses.replace(inputs, read_knowledge=dict)
    for strategy, made in STRATEGIES.items():
        for name in made.hyper if strategy != "freeze" else ():
            spec = cell_of(strategy)
            masks = None if spec.metric is None else MASKS
            hyper = spec.hyperparameters
            assert set(hyper) == set(made.hyper)
            hyper[name] /= 2
            other = dataclasses.replace(spec, hyper=tuple(hyper.items()))
            assert key_of(spec, known, masks) != key_of(other, known, masks), (strategy, name)


@pytest.mark.parametrize(
    "sections",
    [
        {"sweep": {"workers": 7}},
        {"sweep": {"pcts": [0.5]}},
        {"tune": {"freeze": [{"pct": 0.25}], "ewc": [{"strength": 7}]}},
        {"consolidate": {"buffer_images": 7}},  # of other strategies
        {"consolidate": {"fisher_images": 7}},
        {"profile": "other"},
        {"seeds": [0, 1]},
        {"freeze": {"pct": 1.0, "metric": "random"}},
        {"rank": {"aggregate": "mean"}},  # what it leads to lies in the masks
        {"saliency": {"reading": "channel"}},
        {"model": {"head": "multi"}},  # the variant's; the cell's own stands in the spec
        {"runtime": {"threads": 9}},  # what counts is how many there are
    ],
)
def test_the_key_does_not_change_with(inputs, sections):
    assert key_of(FREEZE, inputs, **sections) == key_of(FREEZE, inputs)


def test_the_key_does_not_change_with_the_order_of_the_masks(inputs):
    turned = {name: MASKS[name] for name in reversed(MASKS)}
    assert list(turned) != list(MASKS)
    assert key_of(FREEZE, inputs, turned) == key_of(FREEZE, inputs)


def test_the_key_of_a_third_task_changes_with_how_it_is_ranked(make_sequence):
    inputs = CellInputs(make_sequence(tasks=3), "tasks", {}, "first", unread)
    keys = {
        key_of(FREEZE, inputs, split={"tasks": 3}, **sections)
        for sections in (
            {},
            {"visualize": {"steps": 3}},
            {"visualize": {"start_seed": 3}},
            {"rank": {"reverse": True}},
        )
    }
    assert len(keys) == 4


def test_the_key_changes_with_the_code_of_ones_own_criterion(make_sequence, tmp_path, monkeypatch):
    """Also with what it imports of its folder, where filters are ranked anew by it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    helper = tmp_path / "custom/helper.py"
    helper.parent.mkdir()
    (tmp_path / "custom/score.py").write_text(
        "from custom.helper import WEIGHT\n"
        "from permafrost.ranking import map_metric\n\n"
        "@map_metric(higher_is_better=True)\n"
        "def score(saliency, filters):\n    return WEIGHT * filters\n"
    )
    spec = dataclasses.replace(FREEZE, metric="custom.score:score")
    for tasks, count in ((3, 2), (2, 1)):
        inputs = CellInputs(make_sequence(tasks=tasks), "tasks", {}, "first", unread)
        keys = set()
        for text in ("WEIGHT = 1.0\n", "WEIGHT = 1.0  # as before\n", "WEIGHT = 2.0\n"):
            helper.write_text(text)
            as_in_a_new_process(monkeypatch)
            keys.add(key_of(spec, inputs, split={"tasks": tasks}))
        assert len(keys) == count
    as_in_a_new_process(monkeypatch)


def as_in_a_new_process(monkeypatch):
    """Forget what of ``custom`` was read and imported."""
    key._sources.cache_clear()
    registry._snapshots.clear()
    for name in [name for name in sys.modules if name.startswith("custom")]:
        monkeypatch.delitem(sys.modules, name)


def test_keys_are_for_all_requests_alike():
    assert len(REQUEST.key) == 32
    assert set(REQUEST.key) <= set("0123456789abcdef")
    turned = dataclasses.replace(REQUEST, identity={"b": 1, "a": {"d": 2, "c": 3}})
    same = dataclasses.replace(REQUEST, identity={"a": {"c": 3, "d": 2}, "b": 1})
    assert turned.key == same.key
    kinds = ("cell", "trial", "first_task")
    assert len({dataclasses.replace(REQUEST, kind=kind).key for kind in kinds}) == 3
    assert dataclasses.replace(REQUEST, name="other", params={}).key == REQUEST.key


def test_machine_identity():
    known = machine_identity(CPU, "float32")
    assert known["device"] == "cpu"
    assert known["threads"] == torch.get_num_threads()
    assert known["torch"] == torch.__version__


def test_the_variant_is_one_of_the_sweeps_cells(tmp_path, monkeypatch, make_sequence):
    """From stage freeze's file, with its keys in sorted order, comes the sweep's own key."""
    from permafrost.stages.train_second import cell_inputs, read_masks, variant_spec

    monkeypatch.chdir(tmp_path)
    params = make_params(
        freeze={"metric": "mse", "pct": 0.5}, sweep={"metrics": ["mse"], "pcts": [0.5]}
    )
    orders = make_orders()
    layers = {
        name: {"filters": len(mask), "frozen": mask.nonzero().flatten().tolist()}
        for name, mask in frozen_masks(orders, 0.5).items()
    }
    save_record(Path("models/freeze/0.json"), {"metric": "mse", "pct": 0.5, "layers": layers})
    save_tasks(Path("data/tasks/0.safetensors"), make_sequence())
    save_tensors(Path("models/train_first/0.safetensors"), new_network(params, 0).state_dict())
    spec, masks = variant_spec(params, 0), read_masks(0, params)
    assert spec in sweep_cells(params, chosen_for(params))
    assert list(masks) != list(orders)  # features.11 sorts before features.4
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        name: mask.tolist() for name, mask in frozen_masks(orders, 0.5).items()
    }
    inputs = cell_inputs(0)
    assert inputs.tasks_digest == file_digest(Path("data/tasks/0.safetensors"))
    assert inputs.first_digest == file_digest(Path("models/train_first/0.safetensors"))
    with pytest.raises(InputError, match=r"models/consolidate/0\.safetensors: not found"):
        inputs.read_knowledge()  # only some methods need it
    known = Path("models/consolidate/0.safetensors")
    save_tensors(known, {"buffer/0/labels": torch.arange(3)})
    assert {name: value.tolist() for name, value in inputs.read_knowledge().items()} == {
        "buffer/0/labels": [0, 1, 2]
    }
    assert key_of(spec, inputs, masks) == key_of(FREEZE, inputs, frozen_masks(orders, 0.5))
    with pytest.raises(InputError, match="another variant"):
        read_masks(0, make_params(freeze={"pct": 0.25}))


# The sweep.


def count(specs, **wanted):
    return sum(all(getattr(spec, k) == v for k, v in wanted.items()) for spec in specs)


def test_the_cells_of_a_sweep_by_hand():
    params = make_params(
        seeds=[0, 1, 2],
        sweep={
            "metrics": ["mse", "random"],
            "pcts": [0.25, 0.5, 0.75],
            "heads": ["shared", "multi"],
        },
    )
    specs = sweep_cells(params, chosen_for(params))
    assert count(specs, strategy="freeze") == 2 * 3 * 2 * 3  # the chosen share is one of them
    assert count(specs, strategy="finetune") == 2 * 3
    assert count(specs, strategy="linear_probe") == 2 * 3
    assert count(specs, strategy="joint") == 3 * 3 * 2  # one softmax of all classes too
    assert count(specs, strategy="joint", head="expanding", hyper=(("passes", 2),)) == 3
    assert len(specs) == 36 + 6 + 6 + 18
    assert len(set(specs)) == len(specs)
    assert CellSpec("freeze", 2, "multi", "random", 0.75) in specs
    assert {(spec.metric, spec.pct) for spec in specs if spec.strategy != "freeze"} == {
        (None, None)
    }


def test_the_cells_of_smaller_sweeps():
    sweep = {"strategies": ["joint"], "heads": ["expanding"]}
    params = make_params(sweep=sweep, split={"tasks": 3})
    assert sweep_cells(params, chosen_for(params)) == [
        make_joint(0, "expanding", 1),
        make_joint(0, "expanding", 3),
    ]
    params = make_params(sweep={"strategies": ["finetune"], "metrics": [], "pcts": []})
    assert sweep_cells(params, chosen_for(params)) == [FINETUNE]


def test_the_chosen_share_joins_those_of_the_sweep():
    sweep = {"strategies": ["freeze"], "metrics": ["mse", "random"], "pcts": [0.75, 0.25]}
    sweep["heads"] = ["shared", "multi"]
    params = make_params(sweep=sweep)
    chosen = {"shared": {"freeze": {"pct": 0.5}}, "multi": {"freeze": {"pct": 0.25}}}
    found = [(s.head, s.metric, s.pct) for s in sweep_cells(params, chosen)]
    assert found == [
        ("shared", metric, pct) for metric in ("mse", "random") for pct in (0.25, 0.5, 0.75)
    ] + [("multi", metric, pct) for metric in ("mse", "random") for pct in (0.25, 0.75)]


def test_the_cells_of_the_other_methods():
    """Each with what was chosen for its head; frozen filters are the chosen share by one metric."""
    others = [name for name in STRATEGIES if name not in ("freeze", "joint")]
    params = make_params(
        seeds=[3, 4],
        freeze={"metric": "random", "pct": 0.125},
        sweep={"strategies": others, "heads": ["shared", "multi"]},
    )
    chosen = {
        head: {name: dict(grid[0]) for name, grid in grids(params).items()}
        for head in ("shared", "multi")
    }
    chosen["shared"]["freeze"]["pct"] = 0.375
    chosen["multi"]["freeze"]["pct"] = 0.625
    chosen["multi"]["freeze_ewc"]["strength"] = 7.0
    specs = sweep_cells(params, chosen)
    assert len(specs) == len(set(specs)) == len(others) * 2 * 2
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        mine = chosen[spec.head].get(spec.strategy, {})
        assert spec.hyperparameters == mine
        freezes = spec.strategy in ("freeze_ewc", "freeze_lwf")
        share = chosen[spec.head]["freeze"]["pct"]
        assert (spec.metric, spec.pct) == (("random", share) if freezes else (None, None))
        one = method_cell(params, spec.strategy, spec.seed, spec.head, chosen[spec.head])
        assert one == spec
    assert CellSpec("freeze_ewc", 4, "multi", "random", 0.625, (("strength", 7.0),)) in specs
    share = method_cell(params, "freeze", 3, "multi", chosen["multi"])
    assert share == CellSpec("freeze", 3, "multi", "random", 0.625)


def test_what_is_tried():
    """The frozen share first: those that freeze, too, need what was chosen."""
    params = make_params(
        sweep={"strategies": ["freeze_ewc", "finetune", "ewc", "joint"]},
        tune={"ewc": [{"strength": 1.0}], "si": [{"strength": 5.0}]},
    )
    found = grids(params)
    assert list(found) == ["freeze", "freeze_ewc", "ewc"]
    assert found["ewc"] == [{"strength": 1.0}]
    assert list(grids(make_params(sweep={"strategies": ["ewc", "freeze"]}))) == ["freeze", "ewc"]


def test_names_of_cells():
    params = make_params(seeds=[0, 1])
    specs = sweep_cells(params, chosen_for(params))
    assert len({spec.name for spec in specs}) == len(specs)
    assert FREEZE.name == "freeze mse 50% shared seed 0"
    assert make_joint(1, "multi", 2).name == "joint passes 2 multi seed 1"
    assert LWF.name == "lwf temperature 2 weight 0.5 shared seed 0"
    both = dataclasses.replace(FREEZE, strategy="freeze_ewc", hyper=(("strength", 1e-3),))
    assert both.name == "freeze_ewc mse 50% strength 0.001 shared seed 0"
    assert CellSpec("freeze", 0, "multi", "mse", 0.0).name == "freeze mse 0% multi seed 0"
