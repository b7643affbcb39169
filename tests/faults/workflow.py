"""A tiny project to disturb, and what an undisturbed run of it leaves."""

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from permafrost.artifacts import file_digest
from project import RESULTS, Project, wait_for

SPY = Path(__file__).parent / "spy"

# All that a training may keep besides weights: an observer (SI), masks and phases (PackNet), a
# buffer that draws its own batches (replay), the running statistics of frozen channels.
SMALL = {
    "train": {"epochs": 3},
    "sweep": {
        "strategies": ["finetune", "freeze", "si", "packnet", "replay"],
        "metrics": ["mse"],
        "pcts": [0.5],
        "workers": 2,
    },
    "tune": {
        "freeze": [{"pct": 0.5}],
        "si": [{"strength": 1.0}],
        "packnet": [{"prune": 0.5}],
    },
}


class WatchedProject(Project):
    """A project whose trainings note each epoch that they begin."""

    def __init__(self, folder: Path, changes: dict = SMALL) -> None:
        super().__init__(folder)
        self.change(changes)
        self.commit("small")

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {
            "SHELL": "/bin/sh",  # of the shells that DVC may use, the one that does least by itself
            "EPOCH_LOG": str(self.folder) + ".epochs",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(SPY), os.environ.get("PYTHONPATH")])),
        }

    def epochs(self) -> Counter[str]:
        """Return how many epochs were begun of each training."""
        log = Path(self.environment["EPOCH_LOG"])
        return Counter(log.read_text().split()) if log.exists() else Counter()

    def copy(self, folder: Path) -> "WatchedProject":
        """Return a copy of the project as it is now, trainings and all."""
        other = super().copy(folder)
        log = Path(self.environment["EPOCH_LOG"])
        if log.exists():
            shutil.copyfile(log, other.environment["EPOCH_LOG"])
        return other

    def processes(self) -> list[psutil.Process]:
        """Return the processes that work in the project."""
        found = []
        for process in psutil.process_iter():
            try:
                here = Path(process.cwd()).is_relative_to(self.folder)
                if here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def bits(self) -> dict[str, str]:
        """Return the digest of every file that stages write to data/tasks, metrics and models."""
        parts = (self.folder / part for part in ("data/tasks", "metrics", "models"))
        found = sorted(path for part in parts for path in part.rglob("*"))
        files = [path for path in found if path.is_file() and path.name != "README.md"]
        return {str(path.relative_to(self.folder)): file_digest(path) for path in files}

    def files(self) -> set[str]:
        """Return all files but those that DVC, git and MLflow name by chance."""
        found = {
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        theirs = (".git/", ".dvc/", "mlruns/", ".permafrost/locks/")
        return {name for name in found if not name.startswith(theirs)}


def remove(folder: Path) -> None:
    """Remove a project and its log, to make room for the next."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.epochs").unlink(missing_ok=True)


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nobody disturbs leaves."""

    bits: dict[str, str]
    files: set[str]
    epochs: Counter[str]
    seconds: float
    disk: int  # bytes that it wrote and that lie there at its end


def run_undisturbed(project: WatchedProject) -> Undisturbed:
    """Run the workflow."""
    before, began = disk_usage(project.folder), time.monotonic()
    project.run("dvc", "repro")
    seconds = time.monotonic() - began
    disk = disk_usage(project.folder) - before
    return Undisturbed(project.bits(), project.files(), project.epochs(), seconds, disk)


def disk_usage(folder: Path) -> int:
    """Return how many bytes a folder takes on its disk."""
    return sum(512 * path.lstat().st_blocks for path in folder.rglob("*"))


def kill(process: subprocess.Popen, how: str) -> bool:
    """Kill all of a running `dvc repro`, its stage alone, one of its workers, or DVC alone.

    Returns whether there was anything to kill; a stage or a worker is waited for.
    """
    if process.poll() is not None:
        return False
    if how == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif how == "DVC":
        process.kill()
    else:
        victim = running_stage(process) if how == "the stage" else _running_worker(process)
        try:
            if victim is None or victim.status() == psutil.STATUS_ZOMBIE:
                return False
            victim.kill()
        except psutil.NoSuchProcess:
            return False
    return True


def _running_worker(process: subprocess.Popen) -> psutil.Process | None:
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            stage = running_stage(process)
            if stage and (workers := workers_of(stage)):
                return workers[0]
        time.sleep(0.02)
    return None


def workers_of(stage: psutil.Process) -> list[psutil.Process]:
    """Return the processes in which a stage trains."""
    children = stage.children()
    return [child for child in children if "--multiprocessing-fork" in child.cmdline()]


def running_stage(process: subprocess.Popen, seconds: float = 10) -> psutil.Process | None:
    """Return the stage's process, waiting for one to begin; None if DVC ends first."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            children = psutil.Process(process.pid).children(recursive=True)
            stages = [p for p in children if any("permafrost" in part for part in p.cmdline())]
        except psutil.Error:
            continue
        if stages:
            return stages[0]
        time.sleep(0.02)
    return None


def check_recovered(project: WatchedProject, expected: Undisturbed, trainings: int) -> int:
    """Go on as `make repro` does and hold all that is left against an undisturbed run.

    Returns how many epochs the training that lost most had to begin again.
    """
    project.run("permafrost", "doctor", "--repair", "--notes")
    project.run("dvc", "repro")
    project.run("permafrost", "track")  # as `make repro` does
    assert project.runs() == project.expected_runs()
    bits = project.bits()
    different = {name for name in bits | expected.bits if bits.get(name) != expected.bits.get(name)}
    assert not different, f"other bits: {sorted(different)}"
    stray = project.files() ^ expected.files
    assert not stray, f"stray or missing files: {sorted(stray)}"
    # A stage that begins while DVC dies may not know better, and ends by itself.
    wait_for(lambda: not project.processes(), 300, "the end of all processes")
    status = project.run("git", "status", "--porcelain").splitlines()
    assert status == [f"?? {name}" for name in RESULTS], status
    again = project.epochs() - expected.epochs
    assert len(again) <= trainings, f"more trainings than ran at once were begun again: {again}"
    assert max(again.values(), default=0) <= 1, f"epochs begun again: {again}"
    return max(again.values(), default=0)
