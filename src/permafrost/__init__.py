"""Explainability-guided filter freezing against catastrophic forgetting."""

import os

__version__ = "0.2.0"

# Before the imports, which take a while: whoever has it after the parent's death is no parent.
PARENT = os.getppid()

# Before the code that it hashes is imported.
from permafrost import source as source  # noqa: E402
