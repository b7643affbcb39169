"""The code that runs, known by a hash of its files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent

# What a training depends on; the rest only decides which trainings to ask for.
_TRAINING = (
    "data",
    "models",
    "explain",
    "ranking",
    "freezing",
    "training",
    "evaluation",
    "strategies",
    "seeding.py",
    "experiment.py",
)


def code_digest(folder: Path, parts: Iterable[str] = ("",)) -> str:
    """Hash the Python files in a folder, by default all of them; none if it is not there."""
    digest = hashlib.sha256()
    for part in parts:
        files = [folder / part] if part.endswith(".py") else (folder / part).rglob("*.py")
        # An editor may leave a link to nowhere, such as .#cli.py.
        for path in sorted(file for file in files if file.is_file()):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def training_digest(package: Path) -> str:
    """Hash whatever in the package's folder could change a training's result."""
    return code_digest(package, _TRAINING)


# Of what is imported, whatever becomes of the files: to be imported before the rest.
PACKAGE_CODE = code_digest(PACKAGE)
TRAINING_CODE = training_digest(PACKAGE)
