"""Which folder on which host a project is: by that it knows its own runs on a server."""

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from permafrost.processes import project_lock


@dataclass(frozen=True)
class Place:
    """Where a project is, and where it has been.

    Attributes
    ----------
    here : str
        Its host and folder, ``host:/folder``.
    moved : list of str
        Where it was before it was moved here.
    others : list of str
        Where else its files have been: it may be a copy of a project that is still there.
    inode : int
        Of the file that notes this: kept by a move within a file system, new in a copy.
    """

    here: str
    moved: list[str]
    others: list[str]
    inode: int

    def left(self) -> list[str]:
        """Return where it was moved from and nothing has come since: its runs are this project's.

        A project that is made there later logs under the same name.
        """
        return [place for place in self.moved if _is_gone(place)]


def find_place(root: Path) -> Place:
    """Return where a project is and has been, and note it for when it is moved or copied."""
    path = root / ".permafrost" / "project"
    with project_lock(root, "project"):
        path.touch()
        inode, noted = path.stat().st_ino, _read(path)
        place = _follow(noted, f"{_host()}:{root.resolve()}", inode)
        if place != noted:
            path.write_text(json.dumps(asdict(place)))
    return place


def _follow(noted: Place | None, here: str, inode: int) -> Place:
    if noted is None:
        return Place(here, [], [], inode)
    moved, others = noted.moved, noted.others
    if noted.here != here:
        if inode == noted.inode and _is_gone(noted.here):
            moved = [noted.here, *moved]
        else:
            moved, others = [], [noted.here, *moved, *others]
    known = dict.fromkeys(others)
    return Place(here, [p for p in moved if p != here], [p for p in known if p != here], inode)


def _read(path: Path) -> Place | None:
    text = path.read_text()
    try:
        return Place(**json.loads(text))
    except (ValueError, TypeError):  # of an older version, a random name; empty after a full disk
        return Place(text, [], [], 0) if text else None


def _host() -> str:
    return platform.node().split(".")[0]  # the rest changes with the network


def _is_gone(place: str) -> bool:
    host, _, folder = place.partition(":")
    if host != _host():
        return False
    try:
        Path(folder).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False
