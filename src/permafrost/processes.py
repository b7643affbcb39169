"""Stopping: what a signal or the death of the process that asked for the work does."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

_GRACE = 3.0  # seconds in which a process may end its MLflow run before it is killed


def stop_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: by a KeyboardInterrupt."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Let processes that are started here ignore Ctrl-C, which their parent hears for them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stop_with_parent(parent: int) -> None:
    """Send this process SIGTERM once its parent is dead, however it died, and at last SIGKILL.

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
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2 * _GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def stop_all(processes: Iterable[BaseProcess]) -> None:
    """Stop processes: SIGTERM, and SIGKILL to those that are still there after the grace."""
    stopping = list(processes)
    for process in stopping:
        process.terminate()
    end = time.monotonic() + _GRACE
    for process in stopping:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
