"""The key of a result: the hash of all that it depends on, the code that it reaches among it."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

from permafrost.registry import custom_sources, distribution
from permafrost.source import PACKAGE_SOURCES, foreign, reach_digest, reached

# Known to every run by its version.
_EVERYWHERE = {"torch", *sys.stdlib_module_names}


@cache
def _sources() -> dict[str, str]:
    return PACKAGE_SOURCES | custom_sources()


def sources_digest() -> str:
    """Hash the code that keys are made of: this package and ``custom``, as they were imported."""
    return hashlib.sha256(json.dumps(_sources(), sort_keys=True).encode()).hexdigest()


def code_identity(roots: Iterable[str]) -> dict[str, Any]:
    """Return what changes whenever the code that a run can reach does.

    Parameters
    ----------
    roots : iterable of str
        The modules that it starts from: those that do it, and those of the things that it names.

    Returns
    -------
    dict
        ``code``, a hash of what is reached in this package and in ``custom``, without docstrings
        and comments; ``distributions``, names and versions of those that a user's own code is, or
        imports.
    """
    roots, sources = sorted(set(roots)), _sources()
    own = {module for module in reached(roots, sources) if module.startswith("custom")}
    outside = {root.partition(".")[0] for root in roots} - {"custom", "permafrost"}
    outside |= foreign(own, sources) - _EVERYWHERE
    found = {distribution(package) for package in outside}
    return {
        "code": reach_digest(roots, sources),
        "distributions": sorted(name for name in found if name),
    }


def result_key(identity: dict[str, Any], code: Iterable[str]) -> str:
    """Return a key, 32 hexadecimal digits.

    Parameters
    ----------
    identity : dict
        All that the result depends on besides the code; JSON.
    code : iterable of str
        The modules that it starts from.
    """
    text = json.dumps(identity | code_identity(code), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_fresh_wanted() -> bool:
    """Return whether ``PERMAFROST_FRESH`` says that all is to be made anew."""
    return os.environ.get("PERMAFROST_FRESH", "0") not in ("", "0")
