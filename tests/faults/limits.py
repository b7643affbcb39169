"""Guards for hostile input: no trial hangs, and `permafrost check` gets by on little memory."""

import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 60  # generous: every trial takes a moment


class Hang(BaseException):
    """Not an Exception, which the code under test may turn into a refusal."""


@contextmanager
def no_hang() -> Iterator[None]:
    """Break off what takes too long; end the process if that waits for a thread that hangs."""

    def stop(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def open_folder() -> Iterator[Path]:
    """Make a folder that every user can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="permafrost-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def no_rights(path: Path, rights: int = 0) -> Iterator[None]:
    """Take the rights on a path; root, who may read everything, is another user meanwhile."""
    mode, root = path.stat().st_mode, os.geteuid() == 0
    path.chmod(rights)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(mode)


def check_with_little_memory(folders: list[Path], megabytes: int) -> list[tuple[int, str]]:
    """Run `permafrost check` in each folder in a process of its own, which may use so much more.

    Returns
    -------
    list of (int, str)
        The exit codes, and what was printed.
    """
    result = subprocess.run(
        [sys.executable, __file__, str(megabytes), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=120 + SECONDS * len(folders),
    )
    assert result.returncode == 0, result.stderr
    return [(code, output) for code, output in json.loads(result.stdout)]


def _main(megabytes: int, folders: list[str]) -> None:
    from typer.testing import CliRunner

    import permafrost.check  # noqa: F401
    from permafrost.cli import app

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers = []
    for folder in folders:
        os.chdir(folder)
        result = CliRunner().invoke(app, ["check"])
        answers.append((result.exit_code, result.output))
    print(json.dumps(answers))


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
