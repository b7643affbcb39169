"""Trainings that are stopped, diverge or are copied; `permafrost track` makes their runs whole."""

import dataclasses
import getpass
import json
import shutil
import sqlite3
import subprocess
import time
from contextlib import closing

import pytest
from mlflow.tracking import MlflowClient

from mlflow_faults import (
    EPOCHS,
    expected,
    free_port,
    make_train,
    never,
    request,
    runs_of,
    serve,
    told,
    track,
    train_runs,
)
from permafrost.runs.store import RunStore
from permafrost.tracking import RUNS, RunRecord, Tracker, tracker

pytestmark = pytest.mark.workflow


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (RuntimeError, "FAILED")],
)
def test_a_training_that_is_stopped(make_root, fresh, monkeypatch, error, status):
    monkeypatch.setattr(tracker, "STOPPED_WAIT", 60.0)  # a busy machine may need more than 2
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")

    def stop(epoch):
        raise error

    with pytest.raises(error):
        train_runs(root, [0], stop)
    ((key, *rest),) = runs_of(root / "mlflow.db")
    assert (key, rest[0]) == (request(0).key, status)
    with RunStore(root).lock(key):  # while it is trained again
        assert track(root) == {"written": 0, "deleted": 0, "kept": 0}
    assert track(root) == {"written": 0, "deleted": 1, "kept": 0}
    with pytest.raises(error):
        train_runs(root, [0], stop)
    train_runs(root, [0])
    assert runs_of(root / "mlflow.db") == expected([0])


def test_a_run_says_what_it_is_and_where_it_is_from(make_root, fresh, monkeypatch):
    """In MLflow's own columns: user, source, commit and data set."""
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")
    queued = root / ".dvc/tmp/exps/some"  # where DVC runs an experiment, with a commit of its own
    queued.mkdir(parents=True)
    for folder in (root, queued):
        (folder / "a").write_text(folder.name)
        git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "start"]):
            subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    record = RunRecord("some", RUNS, "some", {"dataset": "digits", "split.tasks": 2})
    monkeypatch.chdir(queued)
    with Tracker(root).live(record) as run:
        run.finish(record)
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name(RUNS).experiment_id])
    assert run.data.tags["mlflow.user"] == getpass.getuser()
    assert run.data.tags["mlflow.source.name"] == root.name
    assert run.data.tags["mlflow.source.git.commit"] == head.stdout.strip()
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == "digits"


def test_a_note_that_its_user_has_changed_stays(make_root, fresh):
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")
    train_runs(root, [0])
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name(RUNS).experiment_id])
    assert run.data.tags["mlflow.note.content"]
    client.set_tag(run.info.run_id, "mlflow.note.content", "the best so far")
    assert track(root) == {"written": 0, "deleted": 0, "kept": 1}


def test_a_view_that_its_user_has_changed_stays(make_root, fresh):
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")
    for state in ({"a": 1}, {"a": 2}):
        Tracker(root).save_view(RUNS, "mine", state)
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    tags = client.get_experiment_by_name(RUNS).tags
    assert json.loads(json.loads(tags["mlflow.sharedViewState.mine"])["state"]) == {"a": 1}


def test_another_process_notes_the_same_data_set_first(make_root, fresh, monkeypatch, capfd):
    root, calls, note = make_root(), [], MlflowClient.log_inputs
    shutil.copy(fresh, root / "mlflow.db")

    def late(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("UNIQUE constraint failed: datasets.name")
        return note(*arguments)

    monkeypatch.setattr(MlflowClient, "log_inputs", late)
    record = RunRecord("some", RUNS, "some", {"dataset": "digits"})
    with Tracker(root).live(record) as run:
        run.finish(record)
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name(RUNS).experiment_id])
    assert (run.info.status, len(run.inputs.dataset_inputs)) == ("FINISHED", 1)
    assert told(capfd.readouterr().err) == []


def test_a_stopped_training_does_not_wait(make_root, monkeypatch, capfd):
    monkeypatch.setattr(tracker, "STOPPED_WAIT", 0.5)
    with serve(never) as (uri, _):
        root, begin = make_root(uri), time.monotonic()
        with pytest.raises(ZeroDivisionError):
            train_runs(root, [0], lambda epoch: 1 / 0)
        assert time.monotonic() - begin < tracker.WAIT
    time.sleep(0.5)  # the call that hung ends with the server
    assert told(capfd.readouterr().err) == []


def test_a_run_of_a_stored_cell_that_is_not_whole_is_rewritten(make_root, fresh):
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")
    train_runs(root, [0])
    for status in ("RUNNING", "KILLED", "FAILED"):
        with closing(sqlite3.connect(root / "mlflow.db")) as store, store:
            store.execute("UPDATE runs SET status = ?", (status,))
            store.execute("DELETE FROM metrics")
        assert track(root) == {"written": 1, "deleted": 1, "kept": 0}
        assert runs_of(root / "mlflow.db") == expected([0])


def test_another_copys_training_under_way_is_left(make_root, fresh):
    server, mine, other = make_root(), make_root(), make_root()
    shutil.copy(fresh, server / "mlflow.db")
    make_root.use(f"sqlite:///{server}/mlflow.db")
    with Tracker(other).live(RunRecord("other", RUNS, "other")):
        pass  # without an end
    for root, deleted in ((mine, 0), (other, 1)):
        assert track(root) == {"written": 0, "deleted": deleted, "kept": 0}
        assert len(runs_of(server / "mlflow.db")) == 1 - deleted


def test_another_copys_run_of_the_same_training_is_left(make_root, fresh):
    server, mine, other = make_root(), make_root(), make_root()
    shutil.copy(fresh, server / "mlflow.db")
    train_runs(mine, [0])
    make_root.use(f"sqlite:///{server}/mlflow.db")
    during = []

    def between(epoch):
        if not during:
            assert track(mine) == {"written": 1, "deleted": 0, "kept": 0}
            during.append(runs_of(server / "mlflow.db"))

    train_runs(other, [0], between)
    assert sorted(status for _, status, *_ in during[0]) == ["FINISHED", "RUNNING"]
    for root in (mine, other):
        assert track(root) == {"written": 0, "deleted": 0, "kept": 1}
    assert [run[:2] for run in runs_of(server / "mlflow.db")] == [(request(0).key, "FINISHED")] * 2


@pytest.mark.parametrize("uri", [None, "sqlite:///mlflow.db"])
def test_all_runs_of_the_projects_own_database_are_its(make_root, fresh, monkeypatch, uri):
    """Also those begun under another name, before .permafrost was deleted."""
    root = make_root(uri)
    monkeypatch.chdir(root)
    shutil.copy(fresh, root / "mlflow.db")
    with Tracker(root).live(RunRecord("old", RUNS, "old")):
        pass  # without an end
    shutil.rmtree(root / ".permafrost")
    assert track(root) == {"written": 0, "deleted": 1, "kept": 0}


@pytest.mark.parametrize("name", ["a:b", "a b%20c", "ö#", "a?b"])
def test_any_path_of_a_project(make_root, tmp_path, name):
    root = make_root() / name
    root.mkdir()
    train_runs(root, [0])
    assert runs_of(root / "mlflow.db") == expected([0])


def test_a_run_that_lacks_its_pictures_is_rewritten(make_root, fresh, tmp_path):
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"a picture")
    plain = RunRecord("variant", "permafrost-variants", "variant", metrics={"acc": 0.5})
    whole = dataclasses.replace(plain, pictures={"picture.png": picture})
    tracker_of_root = Tracker(root)
    tracker_of_root.write(plain)
    for record, written in ((plain, 0), (whole, 1), (whole, 0)):
        assert tracker_of_root.reconcile([record], lambda key: False)["written"] == written
    picture.write_bytes(b"another")
    assert tracker_of_root.reconcile([whole], lambda key: False)["written"] == 1


def test_a_run_that_ends_while_the_store_is_read_stays(make_root, fresh, monkeypatch):
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")
    train_runs(root, [0])
    store = RunStore(root)
    read = Tracker._runs

    def outdated(*arguments):
        runs = read(*arguments)
        for run in runs:
            run.info._status = "RUNNING"
        return runs

    monkeypatch.setattr(Tracker, "_runs", outdated)
    counts = store.tracker.reconcile([], lambda key: False)
    assert counts["deleted"] == 0
    assert runs_of(root / "mlflow.db") == expected([0])


@pytest.mark.parametrize("live", [True, False])
def test_a_training_that_diverged(make_root, fresh, live):
    root = make_root(None if live else f"http://127.0.0.1:{free_port()}")
    shutil.copy(fresh, root / "mlflow.db")
    store, text = RunStore(root), "the loss is not finite; " + "x" * 20000
    row = {"status": "failed", "error": text}
    store.obtain(request(0), make_train(0, row=row))
    make_root.use(None)
    if not live:
        track(root)
    for _ in range(2):
        ((key, status, params, tags, points),) = runs_of(root / "mlflow.db")
        assert (key, status) == (request(0).key, "FAILED")
        assert params == {"seed": "0", "lr": "0.01"}
        assert tags == {"kind": "cell", "error": text[:5000]}
        assert len(points) == EPOCHS
        assert track(root) == {"written": 0, "deleted": 0, "kept": 1}
    store.delete(key)
    track(root)  # a run whose run was deleted stays
    assert len(runs_of(root / "mlflow.db")) == 1


def test_tags_reach_the_run(make_root, fresh):
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")
    begun = RunRecord("live", "permafrost", "live", tags={"a": "1", "long": "x" * 20000})
    ended = RunRecord("live", "permafrost", "live", tags={**begun.tags, "late": "2"})
    tracker = Tracker(root)
    with tracker.live(begun) as run:
        run.finish(ended)
    later = RunRecord("later", "permafrost", "later", tags={"a": "1", "long": "x" * 20000})
    assert tracker.reconcile([ended, later], lambda key: False)["kept"] == 1
    assert tracker.reconcile([ended, later], lambda key: False)["kept"] == 2
    found = {run[0]: run[3] for run in runs_of(root / "mlflow.db")}
    assert found == {
        "live": {"a": "1", "long": "x" * 5000, "late": "2"},
        "later": {"a": "1", "long": "x" * 5000},
    }
