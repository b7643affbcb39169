"""What a strategy is: how a network learns its second and later tasks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn

from permafrost.freezing import FilterMasks
from permafrost.models import Head, TaskNetwork

# Given the network and the number of tasks it has learned, which filters to freeze next.
MaskSource = Callable[[TaskNetwork, int], FilterMasks]


@dataclass(frozen=True)
class Strategy:
    """Plain fine-tuning, and the base of every other strategy.

    A strategy is a set of named hooks that the learner calls; each does nothing here. It learns
    tasks 2..T one after the other from the first task's checkpoint, unless :attr:`sequential` is
    False.

    Attributes
    ----------
    head : {"shared", "multi", "expanding"}
        How the network answers.
    """

    head: Head

    name = "finetune"
    sequential = True

    def while_learning(
        self, network: TaskNetwork, learned: int
    ) -> AbstractContextManager[nn.Module | None]:
        """Return a context that holds while the next task is trained.

        Parameters
        ----------
        network : TaskNetwork
            The network that has learned ``learned`` tasks.
        learned : int
            1 .. T - 1.
        """
        del network, learned
        return nullcontext()
