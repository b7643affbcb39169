"""The exceptions that the command line tells in one line."""


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
