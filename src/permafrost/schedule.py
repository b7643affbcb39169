"""Where a run of the whole workflow stands: noted as it is checked, told as each stage begins."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from permafrost.artifacts import load_json, save_json
from permafrost.errors import InputError
from permafrost.paths import project_root

_PARAMS = Path("params.yaml")


def note_schedule(stages: Mapping[str, float]) -> None:
    """Note what the stages are expected to take with the parameters as they are.

    Parameters
    ----------
    stages : mapping of str to float
        Seconds, by the name and in the order that DVC has them.
    """
    save_json(_schedule(), {"parameters": _digest(), "stages": list(stages.items())})


def place(stage: str) -> str | None:
    """Return which stage of how many begins, and how long is left; None if it is not known.

    It is known after :func:`note_schedule` with the same parameters.
    """
    with suppress(InputError, TypeError, KeyError, ValueError, OSError):
        noted = load_json(_schedule())
        names, seconds = zip(*noted["stages"], strict=True)
        index = names.index(stage)
        if noted["parameters"] == _digest():
            left = duration(sum(seconds[index:]))
            return (
                f"stage {index + 1} of {len(names)}, about {left} left (less if results are stored)"
            )
    return None


def duration(seconds: float) -> str:
    """Return a time in words: ``3 minutes``."""
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit, length = next((u, s) for u, s in units.items() if seconds >= 2 * s or s == 1)
    return f"{seconds / length:.{int(unit == 'hours')}f} {unit}"


def _schedule() -> Path:
    return project_root() / ".permafrost" / "schedule.json"


def _digest() -> str:
    return hashlib.sha256(_PARAMS.read_bytes()).hexdigest()
