"""What a ``dvc exp run`` that was killed leaves of git: told, and mended where it is proven.

DVC takes HEAD off its branch, writes the experiment's ``params.yaml`` and notes in
``refs/exps/exec`` what it is at. It goes back at the experiment's end, but not if it is killed.
Then these notes, no DVC at work and HEAD's log, where only commits follow the step from a branch to
the experiment's commit, prove which branch it was. What the files hold is kept on a branch of its
own, ``params.yaml``, ``dvc.lock`` and the summaries are again what was committed, and HEAD is back
on its branch. Edits of other files stay in these, too.
"""

import re
import subprocess
import sys
from pathlib import Path

from permafrost.dvc_notes import dvc_processes
from permafrost.errors import InputError
from permafrost.stages.shared import PARAMS, SUMMARIES

_NOTES = "refs/exps/exec/EXEC_"


def tell_interrupted(root: Path) -> str:
    """Return a line about an experiment that has left HEAD off its branch; nothing if none has."""
    if _ask(root, "symbolic-ref", "-q", "HEAD") or not _commit(root, f"{_NOTES}BASELINE"):
        return ""
    if dvc_processes(root):
        return ""
    if branch := _branch_left(root):
        return (
            f"git: a `dvc exp run` that was killed has left the branch {branch} and its own "
            "params.yaml; `permafrost doctor --repair` goes back"
        )
    return (
        "git: a `dvc exp run` that was killed has left a branch, but nothing proves which; "
        "`git switch -c NAME && git commit -am edits` keeps what is here, "
        "`git switch BRANCH` goes back"
    )


def check_git(root: Path, *, repair: bool) -> None:
    """Look whether an experiment has left its branch, and go back if asked to and it is proven.

    Raises
    ------
    InputError
        If HEAD stays where it is: also if git refuses.
    """
    told, branch = tell_interrupted(root), _branch_left(root)
    if not told:
        return
    if not (repair and branch):
        raise InputError(told)
    # With what is staged and what is not, on top of the commits that were made meanwhile.
    kept = _do(root, "stash", "create", "interrupted experiment") or _commit(root, "HEAD")
    if kept != _commit(root, f"{_NOTES}HEAD"):
        name = f"interrupted-{kept[:7]}"
        _do(root, "branch", name, kept)
        print(f"git: files and commits as they were are kept on the branch {name}", file=sys.stderr)
    _do(root, "reset", "-q")
    for file in (str(PARAMS), "dvc.lock", *map(str, SUMMARIES)):
        if _ask(root, "ls-files", file):
            _do(root, "checkout", "-q", "--", file)
    _do(root, "switch", "-q", branch)
    for note in ("BASELINE", "MERGE", "BRANCH"):  # as DVC does at the end
        _ask(root, "update-ref", "--no-deref", "-d", _NOTES + note)
    print(f"git: back on the branch {branch}", file=sys.stderr)


def _branch_left(root: Path) -> str:
    """Return the branch from which HEAD came to the experiment's commit, if that is proven."""
    for step in _ask(root, "reflog", "--format=%gs", "HEAD").splitlines():  # the latest first
        if moved := re.fullmatch(r"checkout: moving from (\S+) to (\S+)", step):
            branch, commit = moved.groups()
            began_here = commit == _commit(root, f"{_NOTES}HEAD")
            return branch if began_here and _commit(root, f"refs/heads/{branch}") else ""
        if not step.startswith("commit"):
            break
    return ""


def _commit(root: Path, name: str) -> str:
    return _ask(root, "rev-parse", "-q", "--verify", name)


def _ask(root: Path, *arguments: str) -> str:
    """Return what git prints; nothing if it fails."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _do(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"git {arguments[0]}: {' '.join(result.stderr.split())}")
    return result.stdout.strip()
