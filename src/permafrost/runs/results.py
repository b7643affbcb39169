"""Results of stages that train nothing, kept under the hash of all that they depend on."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from permafrost.errors import DamagedError
from permafrost.runs.key import is_fresh_wanted, result_key
from permafrost.tensors import load_tensors, save_tensors

Result = tuple[dict[str, Tensor], Any]


def results_folder(root: Path) -> Path:
    """Return where a project keeps them; whatever is deleted there is made again."""
    return root / ".permafrost" / "results"


def obtain_result(
    root: Path, identity: dict[str, Any], code: Iterable[str], make: Callable[[], Result]
) -> Result:
    """Return a result; make it if it is not kept, or if ``PERMAFROST_FRESH`` says so.

    Parameters
    ----------
    root : Path
        The project's.
    identity : dict
        All that the result depends on besides the code; JSON.
    code : iterable of str
        The modules that it comes from.
    make : callable
        Returns tensors by name, and anything that JSON can hold.
    """
    path = results_folder(root) / f"{result_key(identity, code)}.safetensors"
    if path.exists() and not is_fresh_wanted():
        try:
            return load_tensors(path)
        except DamagedError as error:
            print(f"{error.args[0].split(';')[0]}; it is made again", file=sys.stderr)
    tensors, about = make()
    save_tensors(path, tensors, about)
    return load_tensors(path)
