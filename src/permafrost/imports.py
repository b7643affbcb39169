"""Imports of large libraries."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from permafrost.errors import InputError


@contextmanager
def uncollected(*, for_good: bool = False) -> Iterator[None]:
    """Import without the garbage collector.

    It would look in vain, again and again, through the many objects of torch and MLflow.

    Parameters
    ----------
    for_good : bool
        Whether to keep it from what is there by now for as long as the process lives: its last
        round, as the process ends, takes a while, too. A few libraries tell what that round missed.
    """
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        gc.enable()


def require_workflow(library: str) -> None:
    """Refuse to go on without a library of the workflow, which the package can be without.

    Raises
    ------
    InputError
        If it is not installed.
    """
    if find_spec(library) is None:
        raise InputError(
            f'{library} is not installed; `pip install "permafrost-cl[workflow]"` adds it'
        )
