"""A thread that does what must not be waited for."""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Thread


class Worker:
    """Does actions that do not raise, one after the other; no process waits for it to exit."""

    def __init__(self) -> None:
        self._actions: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread: Thread | None = None

    def do(self, action: Callable[[], None]) -> None:
        """Take an action."""
        self._actions.put(action)
        if self._thread is None:
            self._thread = Thread(target=self._run, name="mlflow", daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for all actions that were taken; return whether they are done."""
        done = Event()
        self.do(done.set)
        return done.wait(seconds)

    def _run(self) -> None:
        while True:
            self._actions.get()()
