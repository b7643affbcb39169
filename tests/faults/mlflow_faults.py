"""Trainings that take no time, stores and servers that fail, and what every fault must come to."""

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

import pytest
import torch

from permafrost.runs.store import Outcome, RunRequest, RunStore
from permafrost.strategies import Progress
from permafrost.tracking import TrackingError
from permafrost.training import TrainingState
from project import wait_for

EPOCHS = 3
AT_ONCE = 20.0  # seconds; what hangs for ever, or for MLflow's own timeouts, takes longer

# Trainings that take no time.


def request(number):
    about = {"seed": number, "lr": 0.01}
    return RunRequest("cell", f"cell {number}", {"seed": number}, about, ())


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


def train_runs(root, numbers, between=lambda epoch: None):
    """Train runs as one process does; return the longest that one took."""
    store, longest = RunStore(root), 0.0
    for number in numbers:
        begin = time.monotonic()
        store.obtain(request(number), make_train(number, between))
        longest = max(longest, time.monotonic() - begin)
    return longest


def track(root):
    store = RunStore(root)
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
    """Return what a store shows of runs whose trainings it saw, from first to last."""
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


# What every fault must come to.


def survive(root, capfd, make_root, fresh, bound=AT_ONCE):
    """Train under a fault; afterwards a working store must get everything.

    Three trainings in what counts as two processes: none waits long, each tells one line.
    """
    capfd.readouterr()
    longest = max(train_runs(root, [0, 1]), train_runs(root, [2]))
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
