"""Networks that answer several tasks: a body, which maps images to features, and heads."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from permafrost.errors import InputError

Head = Literal["shared", "multi", "expanding"]
HEADS: tuple[Head, ...] = ("shared", "multi", "expanding")


class ConcatenatedHeads(nn.Module):
    """One softmax over the classes of several heads: their logits side by side.

    Parameters
    ----------
    heads : list of nn.Linear
        Each maps (N, D) to (N, C), with a C of its own.
    """

    def __init__(self, heads: list[nn.Linear]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, D) to logits (N, sum of C)."""
        return torch.cat([head(features) for head in self.heads], dim=1)


class TaskNetwork(nn.Module):
    """A body and a linear head for every task.

    Which heads answer is decided by :meth:`view`, so that one checkpoint of the first task serves
    every head mode.

    Parameters
    ----------
    features : nn.Module
        The body. Maps images (N, 3, H, W) to feature maps (N, D, h, w), which are averaged over
        their positions, or to features (N, D).
    channels : int
        D.
    classes : sequence of int
        C_1 .. C_T, how many classes each task has: the outputs of its head.
    is_pooled : bool
        Whether the body gives features (N, D).

    Attributes
    ----------
    classes : tuple of int
        Of the tasks that have a head.
    """

    def __init__(
        self,
        features: nn.Module,
        channels: int,
        classes: Sequence[int],
        *,
        is_pooled: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.is_pooled = channels, is_pooled
        self.classes: tuple[int, ...] = ()
        self.features = features
        self.heads = nn.ModuleList()
        for count in classes:
            self.add_head(count)

    def add_head(self, classes: int) -> None:
        """Add the head of another task, with weights drawn from the global generator.

        Parameters
        ----------
        classes : int
            How many the task has, at least 1.
        """
        with torch.random.fork_rng(devices=[]):  # its default weights are not kept
            head = nn.Linear(self.channels, classes, dtype=torch.float32)
        nn.init.normal_(head.weight, 0, 0.01)
        nn.init.zeros_(head.bias)
        self.heads.append(head.to(next(self.features.parameters()).device))
        self.classes = (*self.classes, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to the logits of all heads side by side, (N, sum of C)."""
        logits: Tensor = self.view("expanding", 0, len(self.heads))(images)
        return logits

    def view(self, head: Head, task: int, seen: int) -> nn.Sequential:
        """Return the plain classifier of one task; it shares all its parameters with the network.

        Parameters
        ----------
        head : {"shared", "multi", "expanding"}
            ``shared``: the first head answers for every task (domain-incremental), of the same size
            each. ``multi``: the task's own head (task-incremental). ``expanding``: one softmax over
            all classes seen so far (class-incremental); labels are then offset by
            :meth:`label_offset`.
        task : int
            0 .. T - 1.
        seen : int
            1 .. T, how many tasks the network has seen; only ``expanding`` reads it.

        Returns
        -------
        nn.Sequential
            Maps images (N, 3, H, W) to logits (N, C), or those of all seen heads if expanding.

        Raises
        ------
        InputError
            If a shared head is to answer for a task with another number of classes.
        """
        if head == "shared" and self.classes[task] != self.classes[0]:
            raise InputError(
                f"model.head: shared answers {self.classes[0]} classes, but task {task + 1} has "
                f"{self.classes[task]}; allowed for tasks of unequal size: multi, expanding"
            )
        if head == "expanding":
            answer: nn.Module = ConcatenatedHeads(list(self.heads[:seen]))  # type: ignore[arg-type]
        else:
            answer = self.heads[task if head == "multi" else 0]
        parts: dict[str, nn.Module] = {"features": self.features}
        if not self.is_pooled:
            parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return nn.Sequential(OrderedDict(parts | {"head": answer}))

    def label_offset(self, head: Head, task: int) -> int:
        """Return what to add to a task's labels 0 .. C - 1 to index the view's logits."""
        return sum(self.classes[:task]) if head == "expanding" else 0
