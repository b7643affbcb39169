"""A project that is moved, copied, or made anew where another was: whose runs are whose."""

import platform
import shutil
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlflow_faults import RealServer, runs_of
from permafrost.cli import app
from permafrost.tracking import RUNS, VARIANTS, RunRecord, Tracker
from permafrost.tracking.place import Place

KEPT = {"written": 0, "deleted": 0, "kept": 1}


@pytest.fixture
def on_server(make_root, fresh, monkeypatch):
    """Return a project that logs to a database outside of it, and that database."""
    server, root = make_root(), make_root()
    shutil.copy(fresh, server / "mlflow.db")
    make_root.use(f"sqlite:///{server}/mlflow.db")
    return root, server / "mlflow.db"


def record(key, **more):
    return RunRecord(key, RUNS, key, metrics={"acc": 0.5}, **more)


def begin(root, key):
    """Begin a run that does not come to its end."""
    with Tracker(root).live(record(key)):
        pass


def track(root, *keys, take_over=False, active=()):
    records = [record(key) for key in keys]
    return Tracker(root).reconcile(records, lambda key: key in active, take_over=take_over)


def statuses(database):
    return Counter((key, status) for key, status, *_ in runs_of(database))


def copy(root, name="copy"):
    return shutil.copytree(root, root.with_name(name), symlinks=True)


# On a server.


def test_a_copy_leaves_the_originals_runs(on_server):
    root, database = on_server
    Tracker(root).write(record("whole"))
    begin(root, "begun")
    other = copy(root)
    # It knows the training from the copied store; "begun" runs in the original.
    assert track(other, "whole") == {"written": 1, "deleted": 0, "kept": 0, "left": 2}
    assert statuses(database) == {("whole", "FINISHED"): 2, ("begun", "RUNNING"): 1}
    begin(other, "begun")
    assert statuses(database)["begun", "RUNNING"] == 2
    assert track(other, "whole")["deleted"] == 1  # its own
    assert track(root, "whole", active=["begun"]) == KEPT
    assert track(root, "whole") == KEPT | {"deleted": 1}
    assert statuses(database) == {("whole", "FINISHED"): 2}


def test_a_moved_project_goes_on_with_its_runs(on_server):
    root, database = on_server
    Tracker(root).write(record("whole"))
    begin(root, "begun")
    moved = root.rename(root.with_name("moved"))
    assert track(moved, "whole") == KEPT | {"deleted": 1}
    assert statuses(database) == {("whole", "FINISHED"): 1}
    back = moved.rename(root)
    assert track(back, "whole") == KEPT
    assert statuses(database) == {("whole", "FINISHED"): 1}


def test_a_move_is_seen_by_a_training_too(on_server):
    root, _ = on_server
    Tracker(root).write(record("old"))
    moved = root.rename(root.with_name("moved"))
    Tracker(moved).write(record("new"))
    assert track(moved, "old", "new") == KEPT | {"kept": 2}


def test_where_moved_and_copied_look_alike_nothing_changes_unless_asked(on_server):
    """Of two copies whose original is gone, neither is the one that was moved."""
    root, database = on_server
    Tracker(root).write(record("whole"))
    begin(root, "begun")
    first, second = copy(root, "first"), copy(root, "second")
    shutil.rmtree(root)
    begin(second, "of the second")
    for _ in range(2):
        assert track(first)["left"] == 2
    assert statuses(database)["begun", "RUNNING"] == 1
    assert track(first, "whole", take_over=True) == KEPT | {"deleted": 1}
    assert track(first, "whole") == KEPT
    assert statuses(database) == {("whole", "FINISHED"): 1, ("of the second", "RUNNING"): 1}
    assert track(second) == {"written": 0, "deleted": 1, "kept": 0}  # nothing is left to it


def test_a_project_made_where_another_was(on_server):
    root, _ = on_server
    Tracker(root).write(record("whole"))
    moved = root.rename(root.with_name("moved"))
    assert track(moved, "whole") == KEPT
    root.mkdir()
    begin(root, "begun")
    assert track(moved, "whole") == KEPT | {"left": 1}
    assert track(root) == {"written": 0, "deleted": 1, "kept": 0}


def test_a_project_of_an_older_version(on_server, monkeypatch):
    """It knew its runs by a random name."""
    root, _ = on_server
    name = "0123456789abcdef" * 2
    with monkeypatch.context() as older:
        older.setattr(Tracker, "place", Place(name, [], [], 0))
        Tracker(root).write(record("whole"))
    (root / ".permafrost").mkdir(exist_ok=True)
    (root / ".permafrost" / "project").write_text(name)
    assert track(root)["left"] == 1
    assert track(root, "whole", take_over=True) == KEPT
    assert track(root, "whole") == KEPT


def test_the_same_folder_on_another_host(on_server, monkeypatch):
    root, _ = on_server
    host = platform.node().split(".")[0]
    begin(root, "begun")
    with monkeypatch.context() as there:
        there.setattr("platform.node", lambda: "elsewhere.example.org")
        assert track(root) == {"written": 0, "deleted": 0, "kept": 0, "left": 1}
    with monkeypatch.context() as same:
        same.setattr("platform.node", lambda: f"{host}.example.org")
        assert track(root) == {"written": 0, "deleted": 1, "kept": 0}


def test_a_note_that_is_lost_or_damaged(on_server):
    """The place itself names the runs, so that nothing is lost with its note."""
    root, _ = on_server
    Tracker(root).write(record("whole"))
    for content in ("", "{", "[1]"):
        (root / ".permafrost" / "project").write_text(content)
        assert track(root, "whole") == KEPT
    shutil.rmtree(root / ".permafrost")
    assert track(root, "whole") == KEPT


def test_what_is_left_is_told_with_the_command(on_server, monkeypatch):
    root, _ = on_server
    begin(root, "begun")
    other = copy(root)
    monkeypatch.setattr("permafrost.maintenance.project_root", lambda: other)
    output = CliRunner().invoke(app, ["track"]).output
    assert f"0 runs kept, 1 runs left to {Tracker(root).place.here}, of which" in output
    command = output.split("`")[1].split()
    assert command[0] == "permafrost"
    output = CliRunner().invoke(app, command[1:]).output
    assert output == "MLflow: 0 runs written, 1 runs deleted, 0 runs kept\n"


def test_a_partial_record_fills_gaps_only(on_server):
    """Whoever has logged it: the training was the same."""
    root, database = on_server
    Tracker(root).write(record("whole", params={"lr": 1}))
    begin(root, "begun")
    other = root.with_name("other")
    gaps = [record(key, partial=True) for key in ("whole", "begun", "new")]
    counts = Tracker(other).reconcile(gaps, lambda key: False)
    assert counts == {"written": 2, "deleted": 0, "kept": 1}
    assert Tracker(other).reconcile(gaps, lambda key: False) == KEPT | {"kept": 3}
    counts = Tracker(root).reconcile(gaps, lambda key: False)
    assert counts == {"written": 0, "deleted": 1, "kept": 3}
    ((*_, params, _, _),) = (run for run in runs_of(database) if run[0] == "whole")
    assert params == {"lr": "1"}
    # More is known later: the run is made whole.
    counts = Tracker(other).reconcile([record("new", params={"lr": 1})], lambda key: False)
    assert counts == {"written": 1, "deleted": 1, "kept": 0}


# In the project's own database.


@pytest.fixture
def with_picture(make_root, fresh, tmp_path):
    """Return a project with a run that has pictures, and the record of that run."""
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")
    pictures = {name: tmp_path / name for name in ("picture.png", "filters/0/layer.png")}
    (tmp_path / "filters/0").mkdir(parents=True)
    for path in pictures.values():
        path.write_bytes(b"a picture")
    variant = RunRecord("variant", VARIANTS, "variant", pictures=pictures)
    Tracker(root).write(variant)
    return root, variant


def pictures_of(root):
    """Return where MLflow's pages find the pictures of the project's runs."""
    from mlflow.tracking import MlflowClient
    from mlflow.utils.file_utils import local_file_uri_to_path

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(VARIANTS)
    runs = client.search_runs([experiment.experiment_id])
    folders = [Path(local_file_uri_to_path(run.info.artifact_uri)) for run in runs]
    return {path for folder in folders for path in folder.rglob("*.png")}


def files(root):
    return {path.relative_to(root) for path in root.rglob("*.png")}


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_pictures_follow_the_project(with_picture, how):
    root, variant = with_picture
    other = root.rename(root.with_name("a b%")) if how == "moved" else copy(root, "a b%")
    before = files(other)
    assert Tracker(other).reconcile([variant], lambda key: False) == KEPT
    found = pictures_of(other)
    assert len(found) == 2
    assert all(path.is_relative_to(other / "mlruns") for path in found)
    Tracker(other).write(RunRecord("new", VARIANTS, "new", pictures=variant.pictures))
    assert len(files(other) - before) == 2
    if how == "copied":
        assert files(root) == before
        assert pictures_of(root) == {root / path for path in before}


def test_pictures_that_are_gone_are_written_again(with_picture):
    root, variant = with_picture
    shutil.rmtree(root / "mlruns")
    counts = Tracker(root).reconcile([variant], lambda key: False)
    assert counts == {"written": 1, "deleted": 1, "kept": 0}
    assert len(pictures_of(root)) == 2
    min(pictures_of(root)).unlink()
    assert Tracker(root).reconcile([variant], lambda key: False)["written"] == 1


def test_places_of_others_are_left(with_picture, tmp_path):
    """An experiment of a user's own may lie anywhere; one in the project moves with it."""
    from mlflow.tracking import MlflowClient

    root, _ = with_picture
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    places = {
        "elsewhere": f"file://{tmp_path}/elsewhere",
        "nearby": f"file://{root}/mlruns_of_mine",
        "within": f"file://{root}/mlruns/within",
    }
    for name, place in places.items():
        client.create_experiment(name, place)
    other = copy(root)
    Tracker(other).experiment_id(VARIANTS)
    client = MlflowClient(f"sqlite:///{other / 'mlflow.db'}")
    found = {name: client.get_experiment_by_name(name).artifact_location for name in places}
    assert found == places | {"within": f"file://{other}/mlruns/within"}


# On MLflow's own server.


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = RealServer(tmp_path_factory.mktemp("server"))
    started.start()
    started.wait()
    yield started
    started.kill()


def test_a_copy_and_a_move_on_a_real_server(server, make_root, tmp_path):
    root = make_root(server.uri)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"a picture")
    variant = RunRecord("variant", VARIANTS, "variant", pictures={"a/picture.png": picture})
    Tracker(root).write(variant)
    begin(root, "begun")
    other = copy(root)
    counts = Tracker(other).reconcile([variant], lambda key: False)
    assert counts == {"written": 1, "deleted": 0, "kept": 0, "left": 2}
    moved = root.rename(root.with_name("moved"))
    assert Tracker(moved).reconcile([variant], lambda key: True) == KEPT
    assert Tracker(moved).reconcile([variant], lambda key: False) == KEPT | {"deleted": 1}
    assert statuses(server.database) == {("variant", "FINISHED"): 2}
