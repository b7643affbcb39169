"""A thread that does what must not be waited for."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")


class Worker:
    """Does actions in a thread, one after the other; no process waits for it to exit."""

    def __init__(self) -> None:
        self._actions: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread: Thread | None = None

    def do(self, action: Callable[[], Result]) -> "Future[Result]":
        """Take an action; its result will be in the future."""
        future: Future[Result] = Future()
        self._actions.put(lambda: _fulfil(future, action))
        if self._thread is None:
            self._thread = Thread(target=self._run, name="mlflow", daemon=True)
            self._thread.start()
        return future

    def wait(self, seconds: float) -> bool:
        """Wait for all actions that were taken; return whether they are done."""
        return bool(wait([self.do(lambda: None)], timeout=seconds).done)

    def _run(self) -> None:
        while True:
            self._actions.get()()


def _fulfil(future: "Future[Result]", action: Callable[[], Result]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)
