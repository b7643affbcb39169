"""The file of weights that networks begin with, if ``model.weights`` names one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from permafrost.artifacts import file_digest
from permafrost.errors import InputError
from permafrost.models import read_weights
from permafrost.params import Params
from permafrost.paths import project_root


@dataclass(frozen=True, eq=False)
class FirstWeights:
    """What networks begin with.

    Attributes
    ----------
    tensors : mapping of str to Tensor, or None
        Of the body by name; None where it is drawn at random.
    digest : str or None
        Hash of their file.
    """

    tensors: Mapping[str, Tensor] | None = None
    digest: str | None = None


def first_weights(path: Path | None) -> FirstWeights:
    """Read the weights that networks begin with from their file, if there is one.

    Raises
    ------
    InputError
        If it is not there, or holds no weights.
    """
    return (
        FirstWeights()
        if path is None
        else FirstWeights(digest=_digest(path), tensors=read_weights(path))
    )


def weights_path(params: Params) -> Path | None:
    """Return the file of the weights that networks begin with; relative to the project."""
    return None if params.model.weights is None else project_root() / params.model.weights


def weights_digest(params: Params) -> str | None:
    """Hash the file of the weights that networks begin with.

    Raises
    ------
    InputError
        If it is not there.
    """
    path = weights_path(params)
    return None if path is None else _digest(path)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"model.weights: {path} is not there")
    return file_digest(path)
