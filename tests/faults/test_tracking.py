"""MLflow fails in every way; trainings go on, and `permafrost track` loses nothing."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch

from permafrost import maintenance
from permafrost.cells import CellRequest, CellStore, Outcome
from permafrost.errors import InputError
from permafrost.strategies import Progress
from permafrost.tracking import (
    CELLS,
    EXPERIMENTS,
    RunRecord,
    Tracker,
    TrackingError,
    redact,
    tracker,
)
from permafrost.training import TrainingState
from project import wait_for

pytestmark = pytest.mark.workflow

EPOCHS = 3
AT_ONCE = 20.0  # seconds; what hangs for ever, or for MLflow's own timeouts, takes longer


# Trainings that take no time.


def request(number):
    about = {"seed": number, "lr": 0.01}
    return CellRequest("cell", f"cell {number}", {"seed": number}, about, ())


def history(number):
    return [
        {"epoch": epoch, "train_loss": number + 1 / epoch, "task": 0, "phase": 0}
        for epoch in range(1, EPOCHS + 1)
    ]


def make_train(number, between=lambda epoch: None, row=None):
    """Return a training of a few epochs; ``between`` is called after each."""

    def train(progress, on_epoch):
        rows = history(number)
        for epoch in range(1, EPOCHS + 1):
            on_epoch(Progress(0, [], training=TrainingState(epoch, {}, rows[:epoch])))
            between(epoch)
        results = {"row": row or {"acc_mean": number / 7, "seconds": 2}, "history": rows}
        return Outcome(results, {"weight": torch.ones(3)}, 1.0)

    return train


def train_cells(root, numbers, between=lambda epoch: None):
    """Train cells as one process does; return the longest that one took."""
    store, longest = CellStore(root), 0.0
    for number in numbers:
        begin = time.monotonic()
        store.obtain(request(number), make_train(number, between))
        longest = max(longest, time.monotonic() - begin)
    return longest


def track(root):
    store = CellStore(root)
    records = store.run_records()
    return store.tracker.reconcile(records, store.is_active)


# What a store holds, read without MLflow.


def runs_of(database):
    """Return the runs that the store shows: key, status, parameters, tags, points."""
    with closing(sqlite3.connect(database)) as store:
        shown = store.execute(
            "SELECT run_uuid, status FROM runs WHERE lifecycle_stage = 'active'"
        ).fetchall()
        found = []
        for run, status in shown:
            tags = dict(store.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run,)))
            params = dict(store.execute("SELECT key, value FROM params WHERE run_uuid = ?", (run,)))
            points = store.execute(
                "SELECT key, step, value FROM metrics WHERE run_uuid = ?", (run,)
            )
            theirs = ("mlflow.", "machine.", "record", "project")
            own = {name: value for name, value in tags.items() if not name.startswith(theirs)}
            found.append((own.pop("key"), status, params, own, sorted(points)))
    return sorted(found, key=lambda run: run[0])


def expected(numbers):
    """Return what a store shows of cells whose trainings it saw, from first to last."""
    runs = []
    for number in numbers:
        points = [
            (f"epoch_{name}", step, value)
            for step, row in enumerate(history(number), start=1)
            for name, value in row.items()
            if name == "train_loss"
        ]
        points += [("acc_mean", 0, number / 7), ("seconds", 0, 2.0)]
        params = {"seed": str(number), "lr": "0.01"}
        runs.append((request(number).key, "FINISHED", params, {"kind": "cell"}, sorted(points)))
    return sorted(runs, key=lambda run: run[0])


def told(text):
    """Return the lines in which a training tells of MLflow; there must be no others."""
    lines = text.splitlines()
    assert all("the training goes on, `permafrost track` logs it" in line for line in lines), text
    return lines


# Stores and servers.


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Return a database as MLflow makes it, to be copied: making one takes seconds."""
    root = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in EXPERIMENTS:
            Tracker(root).experiment_id(name)
    return root / "mlflow.db"


@pytest.fixture
def make_root(tmp_path, monkeypatch):
    """Return a builder of projects, with the tracking URI of each."""
    for name in ("TRACKING_URI", "TRACKING_USERNAME", "TRACKING_PASSWORD", "TRACKING_TOKEN"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    monkeypatch.delenv("PERMAFROST_FRESH", raising=False)
    count = iter(range(1000))

    def build(uri=None):
        root = tmp_path / f"project{next(count)}"
        root.mkdir()
        use(uri)
        return root

    def use(uri):
        if uri is None:
            monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    build.use = use
    return build


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(answer):
    """Serve HTTP by a function of the handler; yield the URI and a count of the requests."""
    over, asked = threading.Event(), Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked["requests"] += 1
            with suppress(OSError):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer(self, over)

        do_POST = do_PATCH = do_PUT = do_GET

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def reply(handler, status, body, **headers):
    handler.send_response(status)
    for name, value in {"Content-Length": len(body), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def never(handler, over):
    over.wait()


@contextmanager
def full():
    """Yield the URI of a port whose queue is full: nobody can connect."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(address)
            yield f"http://127.0.0.1:{address[1]}"


def after_half_a_minute(handler, over):
    over.wait(30)
    reply(handler, 200, b"{}")


def drip(handler, over):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not over.wait(0.1):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def html(handler, over):
    reply(handler, 200, b"<html>\n<body>Please log in</body></html>", Content_Type="text/html")


def unauthorized(handler, over):
    """Repeat what was sent, as careless proxies do."""
    reply(handler, 401, str(handler.headers).replace("\n", " ").encode())


def redirect(handler, over):
    reply(handler, 302, b"", Location=handler.path)


def noise(handler, over):
    handler.wfile.write(bytes(range(256)) * 40)
    handler.close_connection = True


HANGING = {"never answers": never, "answers after 30 s": after_half_a_minute, "drips": drip}
WRONG = {
    "500": lambda handler, over: reply(handler, 500, b"{}"),
    "503 in HTML": lambda handler, over: reply(handler, 503, b"<html>\nbusy"),
    "HTML": html,
    "401": unauthorized,
    "redirects for ever": redirect,
    "noise": noise,
    "empty": lambda handler, over: reply(handler, 200, b""),
    "another JSON": lambda handler, over: reply(handler, 200, b'{"status": "ok"}'),
}


class RealServer:
    """MLflow's own server, which can be killed and started again on the same store."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.database = folder / "mlflow.db"
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.database}"]
        self.log = (self.folder / "log").open("w")
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ | quiet,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self):
        wait_for(self.answers, 120, "the server's start")

    def answers(self):
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module", autouse=True)
def starting_server(tmp_path_factory):
    """Return MLflow's own server, which starts while other tests run."""
    server = RealServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def real_server(starting_server):
    """Return MLflow's own server, running."""
    starting_server.wait()
    return starting_server


@contextmanager
def delayed(port, seconds, what=b""):
    """Forward each connection to a port, each request later by some seconds.

    Only those that hold `what`, if it is given: the server acts on these, but is not heard.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    late = []

    def forward(source, target, delay):
        with suppress(OSError):
            while chunk := source.recv(65536):
                if chunk.startswith((b"GET ", b"POST ", b"PATCH ")) and what in chunk:
                    time.sleep(delay)
                    if what:  # by now the server has closed the other connection
                        target = socket.create_connection(("127.0.0.1", port))
                        late.append(target)
                target.sendall(chunk)
            if not what:
                target.shutdown(socket.SHUT_WR)

    def accept():
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for ends in ((client, server, seconds), (server, client, 0)):
                    threading.Thread(target=forward, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


# What every fault must come to.


def survive(root, capfd, make_root, fresh, bound=AT_ONCE):
    """Train under a fault; afterwards a working store must get everything.

    Three trainings in what counts as two processes: none waits long, each tells one line.
    """
    capfd.readouterr()
    longest = max(train_cells(root, [0, 1]), train_cells(root, [2]))
    lines = told(capfd.readouterr().err)
    assert len(lines) == 2, lines
    assert longest < bound, f"a training took {longest:.1f} s"
    make_root.use(None)
    if fresh is not None:
        shutil.copy(fresh, root / "mlflow.db")
    assert track(root) == {"written": 3, "deleted": 0, "kept": 0}
    assert runs_of(root / "mlflow.db") == expected(range(3))
    return lines[0]


def refuse(root):
    """`permafrost track` must end soon, by one short line."""
    begin = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        track(root)
    assert time.monotonic() - begin < 2 * AT_ONCE
    text = str(caught.value)
    assert text.startswith("MLflow at ")
    assert "\n" not in text
    return text


# The server.


def test_a_server_that_hangs(tally, make_root, fresh, monkeypatch, capfd):
    monkeypatch.setattr(tracker, "WAIT", 0.5)
    with tally("MLflow's server hangs") as fault:
        for case, answer in HANGING.items():
            with fault.trial(case), serve(answer) as (uri, _):
                root = make_root(uri)
                if answer is not drip:  # what drips is waited for until Ctrl-C
                    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
                    assert "Read timed out" in refuse(root)
                message = survive(root, capfd, make_root, fresh)
                assert f"MLflow at {uri} takes longer than 0.5 s" in message


def test_a_server_that_answers_wrongly(tally, make_root, fresh, capfd):
    with tally("MLflow's server answers wrongly") as fault:
        for case, answer in WRONG.items():
            with fault.trial(case), serve(answer) as (uri, _):
                root = make_root(uri)
                assert uri in refuse(root)
                survive(root, capfd, make_root, fresh)


def test_a_server_that_is_down(tally, make_root, fresh, capfd):
    with tally("MLflow's server is down") as fault:
        for case in (f"http://127.0.0.1:{free_port()}", "http://nowhere.invalid"):
            with fault.trial(case):
                root = make_root(case)
                assert case in refuse(root)
                message = survive(root, capfd, make_root, fresh)
                assert "refused" in message or "resolve" in message


def test_a_server_that_does_not_accept(tally, make_root, fresh, monkeypatch, capfd):
    monkeypatch.setattr(tracker, "WAIT", 0.5)
    with tally("MLflow's server hangs") as fault, fault.trial("does not accept"), full() as uri:
        survive(make_root(uri), capfd, make_root, fresh)


def test_the_real_budget(tally, rounds, make_root, fresh, capfd):
    if not rounds(0, 1):
        pytest.skip("only in the long form")
    assert tracker.WAIT <= 10
    with tally("MLflow's server hangs") as fault:
        for case, answer in HANGING.items():
            with fault.trial(f"{case}, really"), serve(answer) as (uri, _):
                survive(make_root(uri), capfd, make_root, fresh, bound=tracker.WAIT + 5)


def test_a_process_ends_though_the_server_hangs(tally, rounds, make_root):
    if not rounds(0, 1):
        pytest.skip("only in the long form")
    script = """
import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])
from permafrost.tracking import tracker; import test_tracking
tracker.WAIT = 0.5
test_tracking.train_cells(Path(sys.argv[1]), [0])
"""
    with tally("MLflow's server hangs") as fault, fault.trial("the exit"):
        with serve(drip) as (uri, _):
            command = [
                sys.executable,
                "-c",
                script,
                str(make_root(uri)),
                str(Path(__file__).parent),
            ]
            path = os.pathsep.join([str(Path(__file__).parent.parent)])
            result = subprocess.run(
                command,
                env=os.environ | {"PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=60,
            )
        assert result.returncode == 0, result.stderr
        assert len(told(result.stderr)) == 1


def test_a_failure_is_told_once_and_ends_the_live_logging_of_its_process(make_root, capfd):
    with serve(WRONG["500"]) as (uri, asked):
        root = make_root(uri)
        store = CellStore(root)
        store.obtain(request(0), make_train(0))
        assert len(told(capfd.readouterr().err)) == 1
        before = asked["requests"]
        store.obtain(request(1), make_train(1))
        assert asked["requests"] == before > 0
        assert told(capfd.readouterr().err) == []
        train_cells(root, [2])  # another process tries again
        assert asked["requests"] > before
        assert len(told(capfd.readouterr().err)) == 1


# Trainings that do not come to their end.


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (RuntimeError, "FAILED")],
)
def test_a_training_that_is_stopped(make_root, fresh, error, status):
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")

    def stop(epoch):
        raise error

    with pytest.raises(error):
        train_cells(root, [0], stop)
    ((key, *rest),) = runs_of(root / "mlflow.db")
    assert (key, rest[0]) == (request(0).key, status)
    with CellStore(root).lock(key):  # while it is trained again
        assert track(root) == {"written": 0, "deleted": 0, "kept": 0}
    assert track(root) == {"written": 0, "deleted": 1, "kept": 0}
    with pytest.raises(error):
        train_cells(root, [0], stop)
    train_cells(root, [0])
    assert runs_of(root / "mlflow.db") == expected([0])


def test_a_stopped_training_does_not_wait(make_root, monkeypatch, capfd):
    monkeypatch.setattr(tracker, "STOPPED_WAIT", 0.5)
    with serve(never) as (uri, _):
        root, begin = make_root(uri), time.monotonic()
        with pytest.raises(ZeroDivisionError):
            train_cells(root, [0], lambda epoch: 1 / 0)
        assert time.monotonic() - begin < tracker.WAIT
    time.sleep(0.5)  # the call that hung ends with the server
    assert told(capfd.readouterr().err) == []


def test_a_run_of_a_stored_cell_that_is_not_whole_is_rewritten(make_root, fresh):
    root = make_root()
    shutil.copy(fresh, root / "mlflow.db")
    train_cells(root, [0])
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
    with Tracker(other).live(RunRecord("other", CELLS, "other")):
        pass  # without an end
    for root, deleted in ((mine, 0), (other, 1)):
        assert track(root) == {"written": 0, "deleted": deleted, "kept": 0}
        assert len(runs_of(server / "mlflow.db")) == 1 - deleted


def test_another_copys_run_of_the_same_training_is_left(make_root, fresh):
    server, mine, other = make_root(), make_root(), make_root()
    shutil.copy(fresh, server / "mlflow.db")
    train_cells(mine, [0])
    make_root.use(f"sqlite:///{server}/mlflow.db")
    during = []

    def between(epoch):
        if not during:
            assert track(mine) == {"written": 1, "deleted": 0, "kept": 0}
            during.append(runs_of(server / "mlflow.db"))

    train_cells(other, [0], between)
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
    with Tracker(root).live(RunRecord("old", CELLS, "old")):
        pass  # without an end
    shutil.rmtree(root / ".permafrost")
    assert track(root) == {"written": 0, "deleted": 1, "kept": 0}


@pytest.mark.parametrize("name", ["a:b", "a b%20c", "ö#", "a?b"])
def test_any_path_of_a_project(make_root, tmp_path, name):
    root = make_root() / name
    root.mkdir()
    train_cells(root, [0])
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
    train_cells(root, [0])
    store = CellStore(root)
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
    store, text = CellStore(root), "the loss is not finite; " + "x" * 20000
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
    track(root)  # a run whose cell was deleted stays
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


# The database.


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
                train_cells(root, [0, 1])
                assert any(word in refuse(root) for word in WORDS[damage.__name__])
                assert max(train_cells(root, [2]), train_cells(root, [3])) < AT_ONCE
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

                assert train_cells(root, [0], lock) < AT_ONCE
                assert train_cells(root, [1]) < AT_ONCE
                assert len(told(capfd.readouterr().err)) == 2
                stack.close()
                track(root)
                assert runs_of(database) == expected([0, 1])


FULL = """
import os, resource, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])
from permafrost.tracking.database import load_mlflow
import test_tracking
load_mlflow(os.environ["MLFLOW_TRACKING_URI"])
if sys.argv[3] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
print(test_tracking.train_cells(Path(sys.argv[1]), [0, 1]))
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
                train_cells(root, [0])
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
    train_cells(root, numbers)


def test_many_writers_on_a_fresh_database(tally, rounds, make_root):
    writers, cells = rounds(2, 8), rounds(2, 4)
    with (
        tally("Many processes write to a fresh MLflow") as fault,
        fault.trial(f"{writers} at once"),
    ):
        root, context = make_root(), multiprocessing.get_context("spawn")
        shares = [range(w * cells, (w + 1) * cells) for w in range(writers)]
        processes = [context.Process(target=write_cells, args=(root, s)) for s in shares]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * writers
        # Logged while they ran: there is nothing left for `permafrost track`.
        assert runs_of(root / "mlflow.db") == expected(range(writers * cells))
        assert track(root) == {"written": 0, "deleted": 0, "kept": writers * cells}


# Secrets.


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:s3cr3t@host/path", "https://host/path"),
        ("https://user:s3@cr3t/@host:5000", "https://host:5000"),
        ("https://s3cr3t@host", "https://host"),
        ("postgresql://user:s3cr3t@host/db", "postgresql://host/db"),
        ("postgresql+psycopg2://user:s3cr3t@host/db", "postgresql+psycopg2://host/db"),
        (
            "mysql+pymysql://host/db?user=me&password=s3cr3t",
            "mysql+pymysql://host/db?user=me&password=***",
        ),
        ("https://host/?sv=2026&sig=s3cr3t", "https://host/?sv=***&sig=***"),
        ("postgresql:///db?sslpassword=s3cr3t%21", "postgresql:///db?sslpassword=***"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_secrets_are_redacted(uri, shown, monkeypatch):
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    assert redact(uri, uri) == shown
    assert redact(f"cannot connect to {uri}: gone", uri) == f"cannot connect to {shown}: gone"


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:s3cr3t%2F@host",
        "https://s3cr3t%2F@host",
        "postgresql://user:s3cr3t%2F@host/db",
        "mysql://host/db?password=s3cr3t%2F&x=1",
        "mysql://host/db?x=1&ssl_key=s3cr3t%2F",
        "https://host/path?api-key=s3cr3t%2F",
        "https://host/path?v=s3cr3t%2F#top",
        "postgresql://host/db?x-sig.v2=s3cr3t%2F",
    ],
)
def test_fragments_of_a_secret_are_redacted(uri):
    text = "bad password s3cr3t%2F (s3cr3t/, Basic dXNlcjpzM2NyM3Qv)"
    assert redact(text, uri).startswith("bad password *** (***, Basic ")
    if "user:" in uri:
        assert redact(text, uri) == "bad password *** (***, Basic ***)"
    assert redact(text, "http://host") == text


def test_no_secret_is_told_or_written(tally, make_root, monkeypatch, capfd):
    secrets = ("s3cr3t", "t0k3n", "dXNlcjpzM2NyM3Q=")  # the last is user:s3cr3t, as HTTP sends it
    with tally("MLflow refuses a password") as fault, serve(unauthorized) as (uri, _):
        place = uri.removeprefix("http://")
        for case, address, variables in (
            ("in the URI", f"http://user:s3cr3t@{place}", {}),
            ("in variables", uri, {"USERNAME": "user", "PASSWORD": "s3cr3t"}),
            ("a token", uri, {"TOKEN": "t0k3n"}),
            ("to a database", "postgresql://user:s3cr3t@127.0.0.1:9/db", {}),
            ("to a host", "http://user:s3cr3t@nowhere.invalid", {}),
        ):
            with fault.trial(case):
                root = make_root(address)
                for name in ("USERNAME", "PASSWORD", "TOKEN"):
                    monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
                for name, value in variables.items():
                    monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
                monkeypatch.setattr(maintenance, "project_root", lambda root=root: root)
                train_cells(root, [0])
                texts = list(capfd.readouterr())
                assert "the training goes on" in texts[1]
                for command in (maintenance.track_all, lambda: maintenance.serve_ui(1)):
                    with pytest.raises(InputError) as caught:
                        command()
                    texts.append(str(caught.value))
                texts += [path.name for path in root.rglob("*")]
                texts += [
                    path.read_text(errors="replace") for path in root.rglob("*") if path.is_file()
                ]
                assert not [text for text in texts if any(s in text for s in secrets)]


def test_the_ui_hides_its_store_and_listens_here_only(rounds, make_root, fresh):
    if not rounds(0, 1):
        pytest.skip("only in the long form")
    root, port = make_root(), free_port()
    shutil.copy(fresh, root / "mlflow.db")
    shutil.copy(Path(__file__).parents[2] / "params.yaml", root)
    (root / "dvc.yaml").touch()
    script = "import os, sys; from permafrost import maintenance; from pathlib import Path;"
    script += "maintenance.project_root = lambda: Path.cwd();"
    script += f"sys.exit(maintenance.serve_ui({port}))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.DEVNULL, start_new_session=True
    )

    def answers():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        wait_for(answers, 120, "the UI's start")
        servers = psutil.Process(process.pid).children(recursive=True)
        commands = [" ".join(server.cmdline()) for server in servers]
        assert any("uvicorn" in command for command in commands)
        assert not [command for command in commands if "mlflow.db" in command]
        listening = [
            line.split()[1]
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
            if line.split()[3] == "0A"
        ]
        assert [place for place in listening if place.endswith(f":{port:04X}")] == [
            f"0100007F:{port:04X}"
        ]
        assert not Path("/proc/net/tcp6").read_text().count(f":{port:04X} 0000")
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name"
        with urllib.request.urlopen(f"{url}?experiment_name=permafrost") as answer:
            assert json.loads(answer.read())["experiment"]["name"] == "permafrost"
    finally:
        process.terminate()
        process.wait(30)


# MLflow's own server, which has started by now.


def test_the_real_server(tally, rounds, real_server, make_root, fresh, monkeypatch, capfd):
    """Up, slow, killed in the middle of a training, down, up again."""
    with tally("MLflow's server dies") as fault:
        with fault.trial("up"):
            assert train_cells(make_root(real_server.uri), [0]) < AT_ONCE
            assert runs_of(real_server.database) == expected([0])
        for number in range(1, rounds(2, 4)):
            root = make_root(real_server.uri)
            with fault.trial(f"killed after epoch {number}"):
                capfd.readouterr()

                def kill(epoch, last=number):
                    if epoch == last:
                        wait_for(
                            lambda: any(r[1] == "RUNNING" for r in runs_of(real_server.database)),
                            60,
                            "the run's start",
                        )
                        real_server.kill()

                assert train_cells(root, [10 * number], kill) < AT_ONCE
                assert train_cells(root, [10 * number + 1]) < AT_ONCE
                assert len(told(capfd.readouterr().err)) == 2
                real_server.start()
                real_server.wait()
                track(root)
                keys = {request(10 * number + more).key for more in (0, 1)}
                found = [run for run in runs_of(real_server.database) if run[0] in keys]
                assert found == expected([10 * number, 10 * number + 1])
                assert track(root)["kept"] == 2
        capfd.readouterr()
        with fault.trial("2 s a call, a long training"), delayed(real_server.port, 2) as uri:
            if not rounds(0, 1):
                return
            root = make_root(uri)
            assert train_cells(root, [100], lambda epoch: time.sleep(8)) < 24 + tracker.WAIT + 5
            assert told(capfd.readouterr().err) == []
            found = [run for run in runs_of(real_server.database) if run[0] == request(100).key]
            assert found == expected([100])
        with fault.trial("2 s a call, short trainings"), delayed(real_server.port, 2) as uri:
            root = make_root(uri)
            assert survive(root, capfd, make_root, fresh, bound=tracker.WAIT + 5)


def test_the_real_server_acts_late(tally, rounds, real_server, make_root, capfd):
    """What it makes of a request that was given up must not stay."""
    if not rounds(0, 1):
        pytest.skip("only in the long form")
    key = request(300).key

    def runs():
        return [run for run in runs_of(real_server.database) if run[0] == key]

    late = delayed(real_server.port, 30, b"/runs/create ")
    with tally("MLflow's server acts 30 s late") as fault, fault.trial("begins a run"), late as uri:
        capfd.readouterr()
        root = make_root(uri)
        assert train_cells(root, [300]) < tracker.WAIT + 5
        assert len(told(capfd.readouterr().err)) == 1
        make_root.use(real_server.uri)
        track(root)
        assert runs() == expected([300])
        wait_for(lambda: len(runs()) > 1, 90, "the late run")
        time.sleep(35)  # for the one that the client has asked for again
        track(root)
        assert runs() == expected([300])


def test_no_secret_is_stored(tally, real_server, make_root):
    """The server takes any password."""
    with tally("a password in the URI of a working store") as fault, fault.trial("HTTP"):
        root = make_root(real_server.uri.replace("//", "//user:s3cr3t@"))
        train_cells(root, [400])
        assert [run for run in runs_of(real_server.database) if run[0] == request(400).key]
        files = [path for path in root.rglob("*") if path.is_file()]
        written = [path.read_bytes() for path in (*files, real_server.database)]
        assert not [content for content in written if b"s3cr3t" in content]


def test_deleted_experiment_is_restored_as_is_said(tmp_path, capsys, monkeypatch):
    """In MLflow's pages it is deleted by one click; its name stays taken."""
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    train_cells(tmp_path, [1])
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.delete_experiment(client.get_experiment_by_name(CELLS).experiment_id)
    train_cells(tmp_path, [2])
    assert "the training goes on" in capsys.readouterr().err
    store = CellStore(tmp_path)
    with pytest.raises(TrackingError, match="was deleted; restore it by `") as raised:
        store.tracker.reconcile(store.run_records(), store.is_active)
    command = str(raised.value).split("`")[1]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        command, shell=True, cwd=tmp_path, env=os.environ | {"PATH": programs}, check=True
    )
    store = CellStore(tmp_path)
    counts = store.tracker.reconcile(store.run_records(), store.is_active)
    assert counts == {"written": 1, "deleted": 0, "kept": 1}
