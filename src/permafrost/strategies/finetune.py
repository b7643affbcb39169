"""Plain fine-tuning: nothing protects the first task. The lower baseline."""

from dataclasses import dataclass
from typing import ClassVar

from permafrost.strategies.base import Strategy


@dataclass(frozen=True)
class Finetune(Strategy):
    """Train every weight on the next task."""

    name: ClassVar[str] = "finetune"
