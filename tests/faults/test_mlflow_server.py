"""MLflow's server hangs, errs, dies or answers late; trainings go on, and nothing is lost."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mlflow_faults import (
    AT_ONCE,
    HANGING,
    WRONG,
    RealServer,
    drip,
    expected,
    free_port,
    full,
    make_train,
    refuse,
    request,
    runs_of,
    serve,
    survive,
    told,
    track,
    train_runs,
)
from permafrost.runs.store import RunStore
from permafrost.tracking import tracker
from project import wait_for

pytestmark = pytest.mark.workflow


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
from permafrost.tracking import tracker; import mlflow_faults
tracker.WAIT = 0.5
mlflow_faults.train_runs(Path(sys.argv[1]), [0])
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
        store = RunStore(root)
        store.obtain(request(0), make_train(0))
        assert len(told(capfd.readouterr().err)) == 1
        before = asked["requests"]
        store.obtain(request(1), make_train(1))
        assert asked["requests"] == before > 0
        assert told(capfd.readouterr().err) == []
        train_runs(root, [2])  # another process tries again
        assert asked["requests"] > before
        assert len(told(capfd.readouterr().err)) == 1


# MLflow's own server, which has started by now.


def test_the_real_server(tally, rounds, real_server, make_root, fresh, monkeypatch, capfd):
    """Up, slow, killed in the middle of a training, down, up again."""
    with tally("MLflow's server dies") as fault:
        with fault.trial("up"):
            assert train_runs(make_root(real_server.uri), [0]) < AT_ONCE
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

                assert train_runs(root, [10 * number], kill) < AT_ONCE
                assert train_runs(root, [10 * number + 1]) < AT_ONCE
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
            assert train_runs(root, [100], lambda epoch: time.sleep(8)) < 24 + tracker.WAIT + 5
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
        assert train_runs(root, [300]) < tracker.WAIT + 5
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
        train_runs(root, [400])
        assert [run for run in runs_of(real_server.database) if run[0] == request(400).key]
        files = [path for path in root.rglob("*") if path.is_file()]
        written = [path.read_bytes() for path in (*files, real_server.database)]
        assert not [content for content in written if b"s3cr3t" in content]
