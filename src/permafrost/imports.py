"""Imports of large libraries."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector from what is imported here, for as long as the process lives.

    It would look in vain through a million objects, again and again while torch and MLflow are
    imported and once more at the end: a third of the time of a short stage.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
