"""Stopping: what a signal or the death of the process that asked for the work does."""

import os
import signal
import threading
import time
from collections.abc import Iterable
from multiprocessing.process import BaseProcess

_GRACE = 3.0  # seconds in which a process may end its MLflow run before it is killed


def stop_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: by a KeyboardInterrupt."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def stop_with_parent() -> None:
    """Send this process SIGTERM once its parent is dead, however it died.

    Otherwise the stages of a `dvc repro` that was killed would work on, unseen, and write beside
    the next one.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

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
