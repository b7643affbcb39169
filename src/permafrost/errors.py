"""The exceptions that the command line tells in one line, and what makes one line of a text."""


class InputError(Exception):
    """Something the user gave (a parameter, a file, a data set) cannot be used.

    Its text is one line: the key or file, what was wrong, what is allowed. The command line prints
    that line without a traceback and ends with exit code 2.
    """


class DamagedError(InputError):
    """A file is there and can be read, but is not what was written."""


class NotFiniteError(InputError, ValueError):
    """A network, or what is computed with it, holds numbers that are not finite.

    Nearly always its training has diverged; a lower learning rate or penalty mends that.
    """


def one_line(error: BaseException) -> str:
    """Return an exception's type and text in one line."""
    return printable(f"{type(error).__name__}: {error}")


def printable(text: str) -> str:
    """Return text in one line, what a terminal could not show as escapes."""
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
