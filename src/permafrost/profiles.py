"""Profiles: ready params files, one command to switch."""

from pathlib import Path

from permafrost.artifacts import write_atomically
from permafrost.errors import InputError
from permafrost.params import load_params

_FOLDER = Path("profiles")
_TARGET = Path("params.yaml")


def list_profiles() -> str:
    """Return the profiles' names, each with its first comment line.

    Raises
    ------
    InputError
        If there is no folder ``profiles``.
    """
    lines = []
    for path in _paths().values():
        first = path.read_text().splitlines()[0].lstrip("# ")
        lines.append(f"{path.stem:12} {first}")
    return "\n".join(lines)


def is_edited() -> bool:
    """Return whether params.yaml is there and is none of the profiles."""
    shipped = {path.read_bytes() for path in _paths().values()}
    return _TARGET.exists() and _TARGET.read_bytes() not in shipped


def write_profile(name: str, *, overwrite: bool = False) -> str:
    """Write params.yaml from a profile, and return what was done.

    Parameters
    ----------
    name : str
        Which one.
    overwrite : bool
        Whether to do so although params.yaml has been edited.

    Raises
    ------
    InputError
        If there is no such profile, or params.yaml has been edited.
    """
    paths = _paths()
    if name not in paths:
        raise InputError(f"profile {name!r} is unknown; allowed: {', '.join(paths)}")
    load_params(paths[name])
    if is_edited() and not overwrite:
        raise InputError(
            f"{_TARGET}: has been edited; `permafrost profile {name} --force` overwrites it"
        )
    write_atomically(_TARGET, paths[name].read_bytes())
    return f"{_TARGET} now holds the profile {name}; `dvc repro` runs it"


def _paths() -> dict[str, Path]:
    paths = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}
    if not paths:
        raise InputError(
            f"{_FOLDER}/: not found; run the command in the folder of a clone of the project, or "
            "in what `permafrost init` has written"
        )
    return paths
