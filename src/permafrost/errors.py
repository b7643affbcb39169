"""The one exception for input that cannot be used."""


class InputError(Exception):
    """Something the user gave (a parameter, a file, a data set) cannot be used.

    Its text is one line: the key or file, what was wrong, what is allowed. The command line prints
    that line without a traceback and ends with exit code 2.
    """
