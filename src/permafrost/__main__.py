"""``python -m permafrost`` is the command ``permafrost``, also where it is not installed."""

from permafrost.cli import app

app(prog_name="permafrost")
