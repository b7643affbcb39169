"""A wish to stop, for which long loops ask: nowhere else is work broken off.

Whoever runs the loops says when: the stages of the workflow, when a signal comes. Nothing here
listens to signals; in a notebook Ctrl-C interrupts as ever.
"""

_requested = False


class Stopped(KeyboardInterrupt):
    """Somebody asked this process to stop."""


def request() -> None:
    """Have every loop of this process stop that asks, from now on."""
    global _requested
    _requested = True


def stop_if_requested() -> None:
    """Raise :class:`Stopped` if the process was asked to stop: long loops call it at each step."""
    if _requested:
        raise Stopped
