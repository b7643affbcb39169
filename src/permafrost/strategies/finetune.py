"""Plain fine-tuning: nothing protects the first task. The lower baseline."""

from dataclasses import dataclass

from permafrost.strategies.base import Strategy, strategy


@strategy("finetune")
@dataclass(frozen=True)
class Finetune(Strategy):
    """Train every weight on the next task."""
