"""Runs: a training as a value, how it is done, and what is derived of its record."""
