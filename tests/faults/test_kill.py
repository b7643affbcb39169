"""`dvc repro` is killed or stopped at any moment, and run again."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec

import psutil
import pytest

from project import wait_for
from workflow import (
    WatchedProject,
    check_recovered,
    kill,
    remove,
    workers_of,
)

HOW = ("all", "the stage", "DVC")


def moments(count: int, seconds: float) -> list[float]:
    """Return random moments, spread over a run."""
    draw = random.Random(0)
    return [seconds * (index + draw.random()) / count for index in range(count)]


def plan(count: int, seconds: float, ways: Sequence) -> list[tuple]:
    """Return how and when to kill: every way at moments over the whole run."""
    return list(zip(itertools.cycle(ways), moments(count, seconds), strict=False))


def test_kill_over_a_whole_run(tally, rounds, undisturbed, tmp_path):
    with tally("kill -9 at a random moment of dvc repro") as fault:
        for how, moment in plan(rounds(1, 30), undisturbed.seconds, HOW):
            with fault.trial(f"{how}, after {moment:.1f} s"):
                project = _killed(lambda: WatchedProject(tmp_path / "project"), how, moment)
                fault.lost(check_recovered(project, undisturbed, trainings=2))
            remove(tmp_path / "project")


def test_kill_over_the_sweep(tally, rounds, undisturbed, before_sweep, tmp_path):
    whole = before_sweep.copy(tmp_path / "whole")
    began = time.monotonic()
    whole.run("dvc", "repro")
    seconds = time.monotonic() - began
    assert whole.bits() == undisturbed.bits
    with tally("kill -9 at a random moment of the sweep, 2 workers") as fault:
        for how, moment in plan(rounds(2, 32), seconds, ("a worker", *HOW)):
            with fault.trial(f"{how}, after {moment:.1f} s"):
                project = _killed(lambda: before_sweep.copy(tmp_path / "project"), how, moment)
                fault.lost(check_recovered(project, undisturbed, trainings=2))
            remove(tmp_path / "project")


def _killed(make_project, how, moment):
    """Return a project whose `dvc repro` was killed; earlier, if it had ended by then."""
    while True:
        project = make_project()
        process = project.start("dvc", "repro", start_new_session=True)
        time.sleep(moment)
        killed = kill(process, how)
        try:
            process.communicate(timeout=600)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
        if killed:
            break
        remove(project.folder)
        moment *= 0.8
    if how != "DVC":  # its stage needs a moment to see that it is alone
        assert not project.processes()
    return project


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT])
def test_stop_in_the_sweep(tally, rounds, undisturbed, before_sweep, tmp_path, way):
    with tally(f"{way.name} to dvc repro in its sweep") as fault:
        for trial in range(rounds(1, 5)):
            with fault.trial(trial):
                project = before_sweep.copy(tmp_path / "project")
                process = _start(project)
                # Not at once: interrupted while it starts, Python itself prints a traceback.
                wait_for(lambda project=project: "RUNNING" in project.statuses(), 120, "a training")
                time.sleep(0.5 * trial)
                output = _stop(fault, project, process, way, rounds(30, 5))
                assert "Traceback" not in output, output
                fault.lost(_track_and_recover(project, undisturbed))
            remove(tmp_path / "project")


def test_kill_while_dvc_notes(tally, rounds, undisturbed, before_sweep, tmp_path):
    """In the middle of .dvc/tmp/rwlock (JSON), of an entry of the run cache, of dvc.lock."""
    moments = ["json:2", "yaml:1", "yaml:2", "json:1", "json:9", "yaml:3", "yaml:4"]
    with tally("kill -9 while DVC writes a note of its own") as fault:
        for moment in moments[: rounds(3, 7)]:
            with fault.trial(moment):
                project = before_sweep.copy(tmp_path / "project")
                project.run("dvc", "repro", code=-signal.SIGKILL, KILL_AT=moment)
                fault.lost(check_recovered(project, undisturbed, trainings=0))
            remove(tmp_path / "project")


def test_stop_at_any_moment(tally, rounds, undisturbed, tmp_path):
    """SIGTERM and Ctrl-C to all processes, and SIGTERM to DVC alone, which tells nobody."""
    ways = (signal.SIGINT, signal.SIGTERM, None)
    with tally("SIGTERM or SIGINT at a random moment of dvc repro") as fault:
        for way, moment in plan(rounds(1, 9), undisturbed.seconds, ways):
            with fault.trial(f"{way}, after {moment:.1f} s"):
                project, process = _under_way(tmp_path / "project", moment)
                _stop(fault, project, process, way, rounds(30, 5))
                fault.lost(_track_and_recover(project, undisturbed))
            remove(tmp_path / "project")


def test_workers_end_with_their_stage(tally, rounds, before_sweep, tmp_path):
    """Also while they still import, when nothing of theirs has run."""
    with tally("kill -9 of the sweep while its workers begin") as fault:
        for delay in (0.3, 0.0, 1.0, 2.0, 4.0)[: rounds(1, 5)]:
            with fault.trial(f"after {delay} s"):
                _kill_beginning_workers(before_sweep.copy(tmp_path / "project"), delay)
            remove(tmp_path / "project")


def _kill_beginning_workers(project, delay):
    process = project.start("permafrost", "sweep")
    stage = psutil.Process(process.pid)
    wait_for(lambda: len(workers_of(stage)) == 2, 60, "the start of the workers")
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not project.processes(), 60, "the end of the workers")


def _under_way(folder, moment):
    """Return a project and its `dvc repro`, begun so long ago; less, if it had ended by then."""
    while True:
        project = WatchedProject(folder)
        process = _start(project)
        time.sleep(moment)
        if process.poll() is None:
            return project, process
        process.communicate()
        remove(folder)
        moment *= 0.8


def _start(project):
    # Ctrl-C is ignored by what was started in the background, as these tests may have been.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return project.start("dvc", "repro", start_new_session=True, preexec_fn=heard)


def _stop(fault, project, process, way, limit):
    """Stop a `dvc repro` and return what it printed; without a way, by SIGTERM to DVC alone."""
    began = time.monotonic()
    if way is None:
        process.terminate()
    else:
        os.killpg(process.pid, way)
    try:
        output, _ = process.communicate(timeout=30)
        _, alive = psutil.wait_procs(project.processes(), timeout=30)
        assert not alive, f"still there: {[p.cmdline() for p in alive]}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - began
    fault.stopped(seconds)
    assert seconds < limit, f"took {seconds:.1f} s to stop"
    assert process.returncode != 0, "it had ended before"
    return output


def _track_and_recover(project, undisturbed):
    """All runs have ended, and what was to be done is done the next time."""
    if (project.folder / "mlflow.db").exists():
        assert set(project.statuses()) <= {"FINISHED", "KILLED"}
        project.run("permafrost", "track")
        assert project.runs() == project.expected_runs()
    return check_recovered(project, undisturbed, trainings=2)


@pytest.mark.parametrize("moment", ["_finish", "_stop"])
def test_killed_between_the_result_and_the_end_of_its_run(undisturbed, tmp_path, moment):
    """No training is left to be done, but its run in MLflow is still RUNNING."""
    project = WatchedProject(tmp_path / "project")
    project.run("dvc", "repro", "split")
    script = (
        "import os, signal\n"
        "from permafrost.stages import train_first\n"
        "from permafrost.tracking import Tracker\n"
        f"Tracker.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train_first.run(0)\n"
    )
    project.run(sys.executable, "-c", script, code=-signal.SIGKILL)
    assert project.statuses() == {"RUNNING": 1}
    project.run("permafrost", "track")
    assert project.statuses() == {"FINISHED": 1}
    check_recovered(project, undisturbed, trainings=0)


def _stop_itself(folder, patch):
    """Return a project whose first training was patched to send itself signals, and stopped."""
    project = WatchedProject(folder)
    project.run("dvc", "repro", "split")
    script = (
        "import os, signal, sys, time\n"
        "from permafrost.cli import app\n"
        "from permafrost.tracking import Tracker, tracker\n"
        f"{patch}"
        "sys.argv[1:] = ['train_first', '--seed', '0']\n"
        "app()\n"
    )
    project.run(sys.executable, "-c", script, code=130)
    return project


def test_stopped_while_its_run_ends(undisturbed, tmp_path):
    """A signal while MLflow is waited for must not leave the run in RUNNING."""
    patch = (
        "def finish(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.5)\n"
        "    end(*arguments)\n"
        "end = Tracker._finish\n"
        "Tracker._finish = finish\n"
    )
    project = _stop_itself(tmp_path / "project", patch)
    assert project.statuses() == {"FINISHED": 1}
    check_recovered(project, undisturbed, trainings=0)


def test_a_second_signal_before_the_first_is_heard(undisturbed, tmp_path):
    """As a worker of the sweep gets one by the stop of all, and one from its stage."""
    patch = (
        "def signalled(function):\n"
        "    def call(*arguments):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return function(*arguments)\n"
        "    return call\n"
        "tracker.LiveRun.log = signalled(tracker.LiveRun.log)\n"
        "tracker.begin_to_stop = signalled(tracker.begin_to_stop)\n"
    )
    project = _stop_itself(tmp_path / "project", patch)
    assert project.statuses() == {"KILLED": 1}
    check_recovered(project, undisturbed, trainings=1)


def test_a_worker_killed_while_the_pool_ends(before_sweep, tmp_path):
    """When all is trained; the worker that waits for work holds a lock that others wait for."""
    project = before_sweep.copy(tmp_path / "project")
    project.run("permafrost", "sweep")
    script = (
        "import os, signal\n"
        "from concurrent.futures.process import _ExecutorManagerThread as Manager\n"
        "from permafrost.stages import sweep\n"
        "def end(manager):\n"
        "    os.kill(min(manager.processes), signal.SIGKILL)\n"
        "    shutdown_workers(manager)\n"
        "shutdown_workers = Manager.shutdown_workers\n"
        "Manager.shutdown_workers = end\n"
        "if __name__ == '__main__':\n    sweep.run()\n"
    )
    for _ in range(5):  # by chance it is the other worker that waits
        project.run(sys.executable, "-c", script)
    wait_for(lambda: not project.processes(), 60, "the end of the workers")


SCRIPT = """
import time, weakref
from permafrost.processes import begin_to_stop, stop_on_signals

def wait(*_):
    print("begun", flush=True)
    time.sleep(60)

class Thing:
    pass

stop_on_signals()
try:
    {work}
    wait()
except KeyboardInterrupt:
    begin_to_stop()
    print("stopping", flush=True)
    time.sleep(1)
print("stopped")
"""


def _begin(work):
    """Start a process that waits for a signal."""

    def hear_all():  # also where these tests were started by nohup
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    command = [sys.executable, "-c", SCRIPT.format(work=work)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, **pipes, text=True, preexec_fn=hear_all)
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_further_signals_do_not_disturb_a_stop(way):
    """DVC, the pool and the death of the parent may all send one."""
    process = _begin("pass")
    process.send_signal(way)
    assert process.stdout.readline() == "stopping\n"
    for another in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(another)
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("stopped\n", 0)


# Stops itself while Triton's library makes its enumerations, from which no exception comes back.
_STOP_IN_AN_IMPORT = """
import os, signal, sys, time
from importlib.machinery import ExtensionFileLoader
import torch
from permafrost.processes import stop_on_signals

def loads(frame):
    return frame and (isinstance(frame.f_locals.get("self"), ExtensionFileLoader)
                      or loads(frame.f_back))

def stop_in_an_enumeration(frame, event, arg):
    if frame.f_code.co_filename.endswith("enum.py") and loads(frame):
        sys.setprofile(None)
        print("begun", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

stop_on_signals()
sys.setprofile(stop_in_an_enumeration)
try:
    import triton
    time.sleep(30)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.skipif(not find_spec("triton"), reason="PyTorch came without Triton")
def test_a_stop_while_compiled_code_is_imported():
    command = [sys.executable, "-c", _STOP_IN_AN_IMPORT]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("begun\nstopped\n", "")


_STOP_AROUND_WITH = """
import os, signal
from contextlib import contextmanager
from threading import Timer
from permafrost import processes

processes._REPEAT = 0.01  # seconds: blocks of `with` are all that there is here
begun = ended = 0

@contextmanager
def block():
    global begun, ended
    begun += 1
    try:
        yield
    except KeyboardInterrupt:
        ended += 1
        raise
    else:
        ended += 1

for delay in range(100):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    processes.stop_on_signals()
    try:
        Timer(delay / 1e4, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while True:
            with block():
                pass
    except KeyboardInterrupt:
        processes.begin_to_stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
print(begun - ended)
"""


def test_a_stop_where_a_block_of_with_begins_or_ends():
    command = [sys.executable, "-c", _STOP_AROUND_WITH]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("0\n", "")


def test_an_interrupt_that_python_drops_is_raised_again():
    """As it does in the callback of a weak reference."""
    process = _begin("thing = Thing(); known = weakref.ref(thing, wait); del thing")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("begun\nstopping\nstopped\n", 0)
