"""Tell of which stages dvc.lock is stale, a line each, and fail if it is of any.

It is where it notes other code, parameters or commands, or other summaries than those in git. What
only DVC's cache holds may be absent, as it is in a clone.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvc.repo import Repo

REMEDY = "run `make repro`, then commit dvc.lock, images.yaml and metrics/"


def stale(repo: Repo) -> dict[str, list[str]]:
    """Return what has changed of each stage that has."""
    outs = [Path(str(out)) for out in repo.index.outs if out.use_cache]
    cached = {str(path) for out in outs for path in (out, *out.parents)}
    found = {stage: list(_changes(told, cached)) for stage, told in repo.status().items()}
    return {stage: changes for stage, changes in found.items() if changes}


def _changes(told: list[Any], cached: set[str]) -> Iterator[str]:
    for part in told:
        if isinstance(part, str):  # of the command
            yield part
            continue
        for files in part.values():
            for path, state in files.items():
                if isinstance(state, dict):  # of parameters
                    yield from (f"{path}: {name} {what}" for name, what in state.items())
                elif not (state in ("deleted", "not in cache") and path in cached):
                    yield f"{path} {state}"


def main() -> None:
    """Look at the project in the current folder."""
    if not Path("dvc.lock").exists():
        sys.exit(f"dvc.lock: not found; {REMEDY}")
    lines = [f"{stage}: {', '.join(changes)}" for stage, changes in stale(Repo()).items()]
    if lines:
        sys.exit("\n".join([*lines, f"dvc.lock is stale; {REMEDY}"]))


if __name__ == "__main__":
    main()
