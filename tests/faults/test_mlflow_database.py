"""MLflow's database is damaged, locked, full, of another version, or written to by many."""

import contextlib
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from mlflow_faults import AT_ONCE, expected, refuse, runs_of, told, track, train_runs
from permafrost.runs.store import RunStore
from permafrost.tracking import RUNS, TrackingError, tracker
from project import wait_for

pytestmark = pytest.mark.workflow


def write_noise(path):
    path.write_bytes(os.urandom(200_000))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty_pages(path):
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)


def make_read_only(path):
    """Set the version that a writer must know: no permissions stop the superuser."""
    with path.open("r+b") as file:
        file.seek(18)
        file.write(b"\x09")


def make_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = (write_noise, truncate, empty_pages, make_read_only, make_folder)
WORDS = {
    "write_noise": ["not a database"],
    "truncate": ["malformed"],
    "empty_pages": ["malformed"],
    "make_read_only": ["readonly"],
    "make_folder": ["unable to open"],
}


def replace(database, fresh):
    """Put a new database in a damaged one's place."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if database.is_dir():
        database.rmdir()
    else:
        database.unlink()
    if engine := SqlAlchemyStore._engine_map.get(f"sqlite:///{database}"):
        engine.dispose()  # what another process would not have open
    shutil.copy(fresh, database)


def test_a_damaged_database(tally, make_root, fresh, capfd):
    with tally("MLflow's database is damaged") as fault:
        for damage in DAMAGES:
            with fault.trial(damage.__name__):
                root = make_root()
                shutil.copy(fresh, root / "mlflow.db")
                damage(root / "mlflow.db")
                train_runs(root, [0, 1])
                assert any(word in refuse(root) for word in WORDS[damage.__name__])
                assert max(train_runs(root, [2]), train_runs(root, [3])) < AT_ONCE
                assert len(told(capfd.readouterr().err)) == 3
                replace(root / "mlflow.db", fresh)
                assert track(root)["written"] == 4
                assert runs_of(root / "mlflow.db") == expected(range(4))


@contextmanager
def locked(database):
    """Have another process lock a database."""
    script = (
        "import sqlite3, sys; store = sqlite3.connect(sys.argv[1]);"
        "store.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(database)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "locked\n"
        yield
    finally:
        process.communicate(timeout=30)


def test_a_locked_database(tally, rounds, make_root, fresh, monkeypatch, capfd):
    monkeypatch.setattr(tracker, "WAIT", 0.5)
    with tally("MLflow's database is locked") as fault:
        for case in ("from the start", "in the middle"):
            with fault.trial(case), contextlib.ExitStack() as stack:
                root = make_root()
                database = root / "mlflow.db"
                shutil.copy(fresh, database)
                if case == "from the start":
                    stack.enter_context(locked(database))
                    if rounds(0, 1):
                        assert "locked" in refuse(root)

                def lock(epoch, database=database, stack=stack, case=case):
                    if epoch == 1 and case == "in the middle":
                        wait_for(lambda: runs_of(database), 30, "the run's start")
                        stack.enter_context(locked(database))

                assert train_runs(root, [0], lock) < AT_ONCE
                assert train_runs(root, [1]) < AT_ONCE
                assert len(told(capfd.readouterr().err)) == 2
                stack.close()
                track(root)
                assert runs_of(database) == expected([0, 1])


FULL = """
import os, resource, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])
from permafrost.tracking.database import load_mlflow
import mlflow_faults
load_mlflow(os.environ["MLFLOW_TRACKING_URI"])
if sys.argv[3] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
print(mlflow_faults.train_runs(Path(sys.argv[1]), [0, 1]))
"""


def test_a_full_disk(tally, rounds, make_root, fresh):
    if not rounds(0, 1):
        pytest.skip("only in the long form")
    arguments = [str(Path(__file__).parent)]
    path = str(Path(__file__).parent.parent)
    with tally("MLflow's disk is full") as fault:
        for case in ("limit", "small disk"):
            root = make_root()
            place = root / "disk"
            place.mkdir()
            shutil.copy(fresh, place / "mlflow.db")
            command = [sys.executable, "-c", FULL, str(root), *arguments, case]
            if case == "small disk":
                if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
                    continue
                mount = (
                    f"mount -t tmpfs -o size=1m none {place} && cp {fresh} {place}/mlflow.db"
                    f' && cat /dev/zero > {place}/zero 2>/dev/null; exec "$@"'
                )
                command = ["unshare", "-rm", "sh", "-c", mount, "sh", *command]
            with fault.trial(case):
                store = {"MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db", "PYTHONPATH": path}
                result = subprocess.run(
                    command, env=os.environ | store, capture_output=True, text=True, timeout=120
                )
                assert result.returncode == 0, result.stderr
                assert float(result.stdout) < AT_ONCE
                assert len(told(result.stderr)) == 1
                shutil.copy(fresh, root / "mlflow.db")
                assert track(root)["written"] == 2
                assert runs_of(root / "mlflow.db") == expected([0, 1])


def make_older(path):
    """Make a database as an older MLflow would have made it."""
    import sqlalchemy
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    config = _get_alembic_config(f"sqlite:///{path}")
    revisions = list(ScriptDirectory.from_config(config).walk_revisions())[::-1]
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revisions[len(revisions) // 2].revision)
    engine.dispose()


def version_of(path):
    with closing(sqlite3.connect(path)) as store:
        return store.execute("SELECT version_num FROM alembic_version").fetchall()


def test_a_database_of_another_mlflow(tally, make_root, fresh, capfd):
    """It must not be upgraded without asking: others may still use it."""
    with tally("MLflow's database is of another version") as fault:
        for case in ("older", "newer"):
            with fault.trial(case):
                root = make_root()
                database = root / "mlflow.db"
                if case == "older":
                    make_older(database)
                else:
                    shutil.copy(fresh, database)
                    with closing(sqlite3.connect(database)) as store, store:
                        store.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
                before = version_of(database)
                capfd.readouterr()
                assert "another version of MLflow" in refuse(root)
                train_runs(root, [0])
                (line,) = told(capfd.readouterr().err)
                assert "`mlflow db upgrade`" in line
                assert version_of(database) == before
                database.unlink()
                shutil.copy(fresh, database)
                track(root)
                assert runs_of(database) == expected([0])


def write_cells(root, numbers):
    """Be one of many processes, which share a few cores: each is given time."""
    tracker.WAIT = 120.0
    torch.set_num_threads(1)
    train_runs(root, numbers)


def test_many_writers_on_a_fresh_database(tally, rounds, make_root):
    writers, runs = rounds(2, 8), rounds(2, 4)
    with (
        tally("Many processes write to a fresh MLflow") as fault,
        fault.trial(f"{writers} at once"),
    ):
        root, context = make_root(), multiprocessing.get_context("spawn")
        shares = [range(w * runs, (w + 1) * runs) for w in range(writers)]
        processes = [context.Process(target=write_cells, args=(root, s)) for s in shares]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * writers
        # Logged while they ran: there is nothing left for `permafrost track`.
        assert runs_of(root / "mlflow.db") == expected(range(writers * runs))
        assert track(root) == {"written": 0, "deleted": 0, "kept": writers * runs}


def test_deleted_experiment_is_restored_as_is_said(tmp_path, capsys, monkeypatch):
    """In MLflow's pages it is deleted by one click; its name stays taken."""
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    train_runs(tmp_path, [1])
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.delete_experiment(client.get_experiment_by_name(RUNS).experiment_id)
    train_runs(tmp_path, [2])
    assert "the training goes on" in capsys.readouterr().err
    store = RunStore(tmp_path)
    with pytest.raises(TrackingError, match="was deleted; restore it by `") as raised:
        store.tracker.reconcile(store.run_records(), store.is_active)
    command = str(raised.value).split("`")[1]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        command, shell=True, cwd=tmp_path, env=os.environ | {"PATH": programs}, check=True
    )
    store = RunStore(tmp_path)
    counts = store.tracker.reconcile(store.run_records(), store.is_active)
    assert counts == {"written": 1, "deleted": 0, "kept": 1}
