"""A new project: the files that it needs beside the installed package."""

import re
from pathlib import Path
from shlex import quote

from permafrost import __version__
from permafrost.artifacts import write_atomically
from permafrost.errors import InputError
from permafrost.source import PACKAGE, TEMPLATE
from permafrost.stages.shared import VERSION

_COPIED = (".dvcignore", ".gitignore", "custom/centre_distance.py", "images.yaml")
_NEXT = """\
{folder} has the files of a project. Next:

  cd {folder}
  git init && dvc init
  git add -A && git commit -m start
  make repro"""


def write_project(folder: Path) -> str:
    """Write the files of a new project into a folder; return what to do next.

    Parameters
    ----------
    folder : Path
        Is created if it is not there.

    Raises
    ------
    InputError
        If it has one of the files already; then nothing is written.
    """
    files = _project_files()
    for name in files:
        if (folder / name).exists():
            raise InputError(f"{folder / name}: is there already; choose another folder")
    for name, text in files.items():
        write_atomically(folder / name, text.encode())
    return _NEXT.format(folder=quote(str(folder)))


def _project_files() -> dict[str, str]:
    """Return what each file of a new project holds, by its place."""
    source = TEMPLATE if TEMPLATE.exists() else PACKAGE.parents[1]  # the repository's root
    globbed = [*source.glob("profiles/*.yaml"), *source.glob("plots/*.json")]
    many = {f"{path.parent.name}/{path.name}": path for path in globbed}
    places = {name: source / name for name in _COPIED} | many
    places |= {"params.yaml": source / "profiles/demo.yaml", "Makefile": source / "workflow.mk"}
    files = {name: path.read_text(encoding="utf-8") for name, path in places.items()}
    stages = (source / "dvc.yaml").read_text(encoding="utf-8")
    return files | {"dvc.yaml": _with_version(stages), str(VERSION): f"{__version__}\n"}


def _with_version(stages: str) -> str:
    """Let stages depend on the file that names the version, instead of on the package's source."""
    return re.sub(
        r"( +- )src/permafrost/.*\n(\1src/permafrost/.*\n)*", rf"\g<1>{VERSION}\n", stages
    )
