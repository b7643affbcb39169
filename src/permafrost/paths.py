"""Where the project and what DVC keeps of it lie."""

import os
from pathlib import Path

from permafrost.errors import InputError


def project_root() -> Path:
    """Return the project's root: also from a copy that ``dvc exp run --temp`` works in.

    Raises
    ------
    InputError
        If this is no DVC project.
    """
    named = os.environ.get("DVC_ROOT")
    if named:
        return Path(named)
    for folder in (here := Path.cwd(), *here.parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise InputError(
        f"{here}: is no DVC project; run the command in a clone of the project, or in what "
        "`permafrost init` has written, after `git init && dvc init`"
    )


def dvc_cache(root: Path) -> Path:
    """Return the folder of DVC's cache.

    Raises
    ------
    InputError
        If DVC's configuration is wrong.
    """
    from dvc.config import Config
    from dvc.exceptions import DvcException

    try:
        return Path(Config(str(root / ".dvc"))["cache"].get("dir") or root / ".dvc" / "cache")
    except DvcException as error:
        raise InputError(f"DVC: {error}") from None


def cached_files(root: Path) -> Path:
    """Return the folder of DVC's cache in which a file's name is the MD5 of its content."""
    return dvc_cache(root) / "files" / "md5"
