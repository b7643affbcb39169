"""Cells: trained once, found again, and whole or made anew."""

import dataclasses
import multiprocessing

import pytest
import torch

from permafrost.errors import InputError
from permafrost.evaluation import Accuracy
from permafrost.machine import fingerprint
from permafrost.runs import store as runs
from permafrost.runs.outcome import Outcome
from permafrost.runs.store import run_record, with_row
from permafrost.strategies import Progress
from permafrost.tensors import load_tensors
from permafrost.training import TrainingState
from small_runs import REQUEST, facts, never, trivial


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
    monkeypatch.setattr(runs, "save_tensors", lambda *arguments: 1 / 0)
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
    """In another process: hold a run."""

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


def test_the_training_is_given_its_progress(store):
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


# Keys.


def test_keys_are_for_all_requests_alike():
    assert len(REQUEST.key) == 32
    assert set(REQUEST.key) <= set("0123456789abcdef")
    turned = dataclasses.replace(REQUEST, identity={"b": 1, "a": {"d": 2, "c": 3}})
    same = dataclasses.replace(REQUEST, identity={"a": {"c": 3, "d": 2}, "b": 1})
    assert turned.key == same.key
    kinds = ("cell", "trial", "first_task")
    assert len({dataclasses.replace(REQUEST, kind=kind).key for kind in kinds}) == 3
    assert dataclasses.replace(REQUEST, name="other", params={}).key == REQUEST.key
