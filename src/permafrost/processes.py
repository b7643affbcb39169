"""Processes beside each other: their locks, and what a signal or the parent's death does."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from filelock import FileLock

from permafrost import stopping

GRACE = 3.0  # seconds that others leave a process to end its MLflow run
_LONGEST = 10  # seconds that it leaves itself


def project_lock(root: Path, name: str, timeout: float = -1) -> FileLock:
    """Return a lock among the processes that work in a project.

    The system releases it when the process that holds it dies, however it dies.

    Parameters
    ----------
    root : Path
        The project's.
    name : str
        What it keeps the others from.
    timeout : float
        The seconds to wait for it before :class:`filelock.Timeout` is raised; -1 waits for ever.
    """
    path = root / ".permafrost" / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=timeout)


def stop_on_signals() -> None:
    """Let SIGTERM, Ctrl-C or a closed terminal stop this process where its loops ask for it.

    Where it comes to none, as in a long import or while it waits for another process, SIGALRM ends
    it after ten seconds.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as deaf_children and nohup wish
            signal.signal(number, _stop)


def _stop(*_: object) -> None:
    stopping.request()
    signal.alarm(signal.alarm(0) or _LONGEST)  # a further signal does not put it off


@contextmanager
def deaf_children() -> Iterator[None]:
    """Let processes that are started here ignore Ctrl-C, which their parent hears for them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stop_with_parent(parent: int) -> None:
    """Stop this process, as by a signal, once its parent is dead, however it died.

    Otherwise the stages of a `dvc repro` that was killed would work on, unseen, and write beside
    the next one.

    Parameters
    ----------
    parent : int
        Its process id; the parent may be dead already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        _stop()

    threading.Thread(target=watch, daemon=True).start()


def stop_group(leader: subprocess.Popen[bytes]) -> None:
    """Stop a process that leads a group of its own, and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        leader.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)


def stop_all(processes: Iterable[BaseProcess], grace: float) -> None:
    """Stop processes: SIGTERM, and SIGKILL to those that are still there after the grace."""
    asked = list(processes)
    for process in asked:
        process.terminate()
    end = time.monotonic() + grace
    for process in asked:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
