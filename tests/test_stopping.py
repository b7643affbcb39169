"""A stop is asked for by signals and made by loops, between two steps."""

import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from permafrost import check, processes, stopping
from permafrost.cli import app
from permafrost.data import Batches
from permafrost.data.datasets import load_dataset
from permafrost.explain import visualize_filters
from permafrost.images import images_digest
from permafrost.names import load_checked
from permafrost.processes import stop_all
from permafrost.stages import report
from permafrost.training import TrainingConfig, fit
from project import REPOSITORY

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def ask(monkeypatch):
    """Return what asks this process to stop, until the test has ended."""
    monkeypatch.setattr(stopping, "_requested", False)
    return stopping.request


@pytest.fixture
def batches(make_sequence):
    sequence = make_sequence()
    return Batches(sequence.tasks[0].train, sequence.normalization, "cpu")


@pytest.mark.parametrize(("step", "kept"), [(1, 0), (3, 0), (4, 1), (5, 1)])
def test_a_training_stops_after_the_step_that_is_under_way(ask, make_network, batches, step, kept):
    """Of two epochs of four steps each; what was measured after an epoch is kept."""

    class Watch:
        tensors, steps = {}, 0

        def before_step(self):
            pass

        def after_step(self):
            self.steps += 1
            if self.steps == step and step != 4:
                ask()

    watch, stored = Watch(), []

    def store(state):
        stored.append(state.epoch)
        if step == 4:
            ask()

    with pytest.raises(stopping.Stopped):
        fit(
            make_network().view("shared", 0, 1),
            batches,
            TrainingConfig(epochs=2, batch_size=2),
            generator=torch.Generator().manual_seed(0),
            observer=watch,
            on_epoch=store,
        )
    assert (watch.steps, len(stored)) == (step, kept)


def read_in_order(batches, folder):
    list(batches.ordered(2))


def draw_an_epoch(batches, folder):
    list(batches.epoch(torch.Generator(), 2, flip=False, padding=0))


def picture_filters(batches, folder):
    visualize_filters(nn.Sequential(nn.Conv2d(3, 2, 3)), "0", start=torch.zeros(3, 8, 8), steps=2)


def read_images(batches, folder):
    load_dataset("image_folder", folder, 8)


def hash_images(batches, folder):
    params = load_checked(REPOSITORY / "params.yaml")
    split = params.split.model_copy(update={"dataset": "image_folder", "root": str(folder)})
    images_digest(params.model_copy(update={"split": split}), folder)


@pytest.mark.parametrize(
    "loop", [read_in_order, draw_an_epoch, picture_filters, read_images, hash_images]
)
def test_every_long_loop_asks(ask, batches, tmp_path, loop):
    for name in ("train/cat/0.png", "train/dog/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    loop(batches, tmp_path)
    ask()
    with pytest.raises(stopping.Stopped):
        loop(batches, tmp_path)


def test_a_stage_that_is_done_tells_that_it_was_to_stop(ask, monkeypatch):
    """Or DVC, which ignores Ctrl-C while a stage runs, would begin the next."""
    monkeypatch.setattr(report, "run", ask)
    result = CliRunner().invoke(app, ["report"])
    assert result.exit_code == 130
    assert result.stderr == "permafrost: stopped; what is done so far is kept\n"


@pytest.fixture
def heeded():
    """Have no signal ignored, as Ctrl-C is in the background."""
    before = [signal.signal(number, signal.SIG_DFL) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded")
def test_only_stages_listen_to_signals(monkeypatch):
    heard = {}

    def note(name):
        heard[name] = [signal.getsignal(number) for number in SIGNALS]
        return ""

    before = [signal.getsignal(number) for number in SIGNALS]
    monkeypatch.setattr(check, "check_all", lambda: note("check"))
    monkeypatch.setattr(report, "run", lambda: note("report"))
    for command in ("check", "report"):
        assert CliRunner().invoke(app, [command]).exit_code == 0
    assert heard["check"] == before
    assert heard["report"] == [processes._stop] * len(SIGNALS)


LOOP = """
import os, signal, sys, time
from permafrost import processes
from permafrost.stopping import stop_if_requested
processes._LONGEST = 3
{begin}
print("begun", flush=True)
try:
    while True:
        time.sleep(0.01)
        {ask}
except KeyboardInterrupt:
    print("stopping", flush=True)
    time.sleep(1)
    print("stopped", file=sys.stderr)
"""


def start(begin="processes.stop_on_signals()", ask="stop_if_requested()"):
    """Start a process with a loop."""

    def hear_all():  # also where these tests were started by nohup
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.format(begin=begin, ask=ask)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_all,
    )
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_heard_once(number):
    """DVC, the pool and the death of the parent may all send one."""
    process = start()
    process.send_signal(number)
    assert process.stdout.readline() == "stopping\n"
    for further in SIGNALS:
        process.send_signal(further)
    output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("", "stopped\n", 0)


def test_what_does_not_ask_is_ended():
    process = start(ask="pass")
    began = time.monotonic()
    while process.poll() is None and time.monotonic() < began + 60:
        process.send_signal(signal.SIGTERM)  # further ones do not put it off
        time.sleep(0.1)
    assert process.wait() == -signal.SIGALRM
    assert time.monotonic() - began > 2
    process.communicate()


def test_a_signal_that_is_ignored_stays_so():
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    process = start(f"{ignore}processes.stop_on_signals()")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert process.communicate(timeout=60) == ("stopping\n", "stopped\n")


def test_a_process_stops_with_its_parent():
    loop = LOOP.format(
        begin="processes.stop_with_parent(os.getppid())", ask="stop_if_requested()"
    ).replace('print("stopping", flush=True)', "pass")  # nobody reads it
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {loop!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", parent], stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert result.stderr == "stopped\n"


def _wait(begun, ignore):
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignore else signal.SIG_DFL)
    begun.set()
    time.sleep(60)


def test_workers_that_do_not_stop_are_killed():
    context = get_context("fork")
    workers = []
    for ignore in (False, True):
        begun = context.Event()
        workers.append(context.Process(target=_wait, args=(begun, ignore)))
        workers[-1].start()
        assert begun.wait(60)
    stop_all(workers, 0.5)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [-signal.SIGTERM, -signal.SIGKILL]


def test_the_library_listens_to_no_signal():
    script = (
        "import signal\n"
        "before = [signal.getsignal(n) for n in signal.valid_signals() if n < 32]\n"
        "import permafrost.stages.sweep\n"
        "print(before == [signal.getsignal(n) for n in signal.valid_signals() if n < 32])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr
