"""`dvc repro` is killed or stopped at any moment, and run again."""

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

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

pytestmark = pytest.mark.workflow

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
        for how, moment in plan(rounds(1, 12), undisturbed.seconds, HOW):
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
        for how, moment in plan(rounds(1, 16), seconds, ("a worker", *HOW)):
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
    assert (process.returncode == 0) == (how == "a worker")  # that is replaced
    if how != "DVC":  # its stage needs a moment to see that it is alone
        assert not project.processes()
    return project


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT])
def test_stop_in_the_sweep(tally, rounds, undisturbed, before_sweep, tmp_path, way):
    if way == signal.SIGTERM and not rounds(0, 1):
        pytest.skip("the other signal is tried; both in the long form")
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
    """In the middle of .dvc/tmp/rwlock (JSON), of an entry of the run cache, of dvc.lock.

    What is left is told and mended, and nothing is trained again.
    """
    moments = ["json:2", "yaml:1", "yaml:2", "json:1", "json:9", "yaml:3", "yaml:4"]
    with tally("kill -9 while DVC writes a note of its own") as fault:
        for moment in moments[: rounds(1, 7)]:
            with fault.trial(moment):
                project = before_sweep.copy(tmp_path / "project")
                project.run("dvc", "repro", code=-signal.SIGKILL, KILL_AT=moment)
                told = project.run("permafrost", "doctor", "--notes", code=2)
                assert "`permafrost doctor --repair` mends it" in told
                fault.lost(check_recovered(project, undisturbed, trainings=0))
            remove(tmp_path / "project")


def test_stop_at_any_moment(tally, rounds, undisturbed, tmp_path):
    """SIGTERM and Ctrl-C to all processes, and SIGTERM to DVC alone, which tells nobody."""
    ways = (signal.SIGINT, signal.SIGTERM, None)
    with tally("SIGTERM or SIGINT at a random moment of dvc repro") as fault:
        for way, moment in plan(rounds(1, 6), undisturbed.seconds, ways):
            with fault.trial(f"{way}, after {moment:.1f} s"):
                project, process = _under_way(tmp_path / "project", moment)
                _stop(fault, project, process, way, rounds(30, 12))  # SIGALRM comes after ten
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
    """A run that a busy machine left RUNNING is repaired; what is to be done is done."""
    if (project.folder / "mlflow.db").exists():
        project.run("permafrost", "track")
        assert project.runs() == project.expected_runs()
    return check_recovered(project, undisturbed, trainings=2)


@pytest.mark.parametrize("moment", ["_finish", "_stop"])
def test_killed_between_the_result_and_the_end_of_its_run(rounds, undisturbed, tmp_path, moment):
    """No training is left to be done, but its run in MLflow is still RUNNING."""
    if moment == "_stop" and not rounds(0, 1):
        pytest.skip("the other moment is tried; both in the long form")
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


def test_further_signals_while_its_run_is_stopped(undisturbed, tmp_path):
    """As a worker of the sweep gets one by the stop of all, and one from its stage."""
    patch = (
        "def signalled(function):\n"
        "    def call(*arguments):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return function(*arguments)\n"
        "    return call\n"
        "tracker.LiveRun.log = signalled(tracker.LiveRun.log)\n"
        "tracker.LiveRun.stop = signalled(tracker.LiveRun.stop)\n"
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
