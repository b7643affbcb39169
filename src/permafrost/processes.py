"""Processes beside each other: their locks, and what a signal or the parent's death does."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ExtensionFileLoader
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from filelock import FileLock

_GRACE = 3.0  # seconds in which a process may end its MLflow run before it is killed
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_REPEAT = 0.5  # seconds after which an interrupt that nobody caught is raised again


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
    """Let SIGTERM, Ctrl-C or a closed terminal end this process by a KeyboardInterrupt.

    Whoever catches it first and has work to do calls :func:`begin_to_stop`.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    sys.unraisablehook = _tell_unless_interrupted
    signal.signal(signal.SIGALRM, _interrupt)
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as deaf_children and nohup wish
            signal.signal(number, _interrupt)


def begin_to_stop() -> None:
    """Ignore further signals: DVC, the pool and the death of the parent may all send one."""
    for number in (*_STOPPING, signal.SIGALRM):
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    if 0 < left <= _REPEAT:
        return  # another one now could break off what the first has begun to end
    # Again and again until it is heard: Python drops what is raised while it collects garbage.
    signal.setitimer(signal.ITIMER_REAL, _REPEAT)
    if not (_is_in_with(frame) or _loads_extension(frame)):
        raise KeyboardInterrupt


def _is_in_with(frame: FrameType | None) -> bool:
    """Return whether a block of `with` begins or ends: interrupted there, it would not be left."""
    return frame is not None and frame.f_code.co_filename == contextmanager.__code__.co_filename


def _loads_extension(frame: FrameType | None) -> bool:
    """Return whether compiled code is imported now: some, as Triton's, aborts if interrupted."""
    while frame:
        if issubclass(type(frame.f_locals.get("self")), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def _tell_unless_interrupted(dropped: "sys.UnraisableHookArgs") -> None:
    if dropped.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(dropped)


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


def stop_group(leader: subprocess.Popen[bytes]) -> None:
    """Stop a process that leads a group of its own, and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        leader.wait(_GRACE)
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)


def stop_all(processes: Iterable[BaseProcess]) -> None:
    """Stop processes: SIGTERM, and SIGKILL to those that are still there after the grace."""
    stopping = list(processes)
    for process in stopping:
        process.terminate()
    end = time.monotonic() + _GRACE
    for process in stopping:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
