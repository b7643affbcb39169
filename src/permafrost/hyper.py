"""Hyperparameters: numbers within bounds, or words; without PyTorch."""

from collections.abc import Mapping

Value = float | str
# The least and the greatest number, or the words.
Allowed = tuple[float, float] | tuple[str, ...]


def is_word(allowed: Allowed) -> bool:
    """Return whether a hyperparameter is one of some words."""
    return isinstance(allowed[0], str)


def is_allowed(value: object, allowed: Allowed) -> bool:
    """Return whether a hyperparameter may have a value."""
    if is_word(allowed):
        return value in allowed
    low, high = map(float, allowed)
    return isinstance(value, int | float) and low <= value <= high


def span(allowed: Allowed) -> str:
    """Return what is allowed as people read it."""
    return (", " if is_word(allowed) else "..").join(map(as_text, allowed))


def as_text(value: Value) -> str:
    """Return a value as people read it."""
    return value if isinstance(value, str) else f"{value:g}"


def number(values: Mapping[str, Value], name: str, default: float = 0.0) -> float:
    """Return a hyperparameter that is a number."""
    return float(values.get(name, default))
