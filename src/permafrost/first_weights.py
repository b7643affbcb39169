"""The file of weights that networks begin with, if ``model.weights`` names one."""

from pathlib import Path

from torch import Tensor

from permafrost.artifacts import file_digest
from permafrost.errors import InputError
from permafrost.models import read_weights
from permafrost.params import Params
from permafrost.paths import project_root


def first_weights(params: Params) -> dict[str, Tensor] | None:
    """Read the weights that networks begin with, if ``model.weights`` names a file."""
    path = weights_path(params)
    return None if path is None else read_weights(path)


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
    if path is not None and not path.is_file():
        raise InputError(f"model.weights: {path} is not there")
    return None if path is None else file_digest(path)
