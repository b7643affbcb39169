"""What the processes of a project tell each other of a store that failed."""

import hashlib
import time
from contextlib import suppress
from pathlib import Path

_SAY_AGAIN = 3600.0  # seconds without a failure after which the next is said again


class Outage:
    """What the processes of a project know of a store that failed: a file, by its age."""

    def __init__(self, folder: Path, uri: str) -> None:
        digest = hashlib.sha256(uri.encode()).hexdigest()[:8]
        self._path, self._uri = folder / f"mlflow.failed.{digest}", uri

    def age(self) -> float:
        """Return how many seconds ago the store failed last."""
        try:
            return abs(time.time() - self._path.stat().st_mtime)
        except OSError:
            return float("inf")

    def note(self) -> bool:
        """Note a failure; return whether it is the first for long, to be said."""
        try:
            if self.age() > _SAY_AGAIN:
                self._path.unlink(missing_ok=True)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("x") as file:  # of several processes one says it
                file.write(f"{self._uri}\n")
        except FileExistsError:
            self._path.touch()
            return False
        except OSError:
            pass  # a full disk
        return True

    def end(self) -> None:
        """Note that the store works."""
        with suppress(OSError):
            self._path.unlink()
