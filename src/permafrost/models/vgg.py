"""The VGG family for small images, with one linear head per task."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from permafrost.errors import InputError
from permafrost.seeding import derive_seed

Head = Literal["shared", "multi", "expanding"]
HEADS: tuple[Head, ...] = ("shared", "multi", "expanding")

# Convolutions of each block, a max-pooling after each (Simonyan & Zisserman 2015, table 1).
ARCHITECTURES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
FILTERS = (64, 128, 256, 512, 512)


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
    """A feature extractor and a linear head for every task.

    Which heads answer is decided by :meth:`view`, so that one checkpoint of the first task serves
    every head mode.

    Parameters
    ----------
    features : nn.Module
        Maps images (N, 3, H, W) to feature maps (N, D, h, w).
    channels : int
        D.
    classes : sequence of int
        C_1 .. C_T, how many classes each task has: the outputs of its head.
    """

    def __init__(self, features: nn.Module, channels: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.features = features
        self.heads = nn.ModuleList(
            nn.Linear(channels, count, dtype=torch.float32) for count in self.classes
        )

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
        return nn.Sequential(
            OrderedDict(
                features=self.features,
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                head=answer,
            )
        )

    def label_offset(self, head: Head, task: int) -> int:
        """Return what to add to a task's labels 0 .. C - 1 to index the view's logits."""
        return sum(self.classes[:task]) if head == "expanding" else 0


def build_network(
    arch: str,
    *,
    width: float,
    batch_norm: bool,
    classes: Sequence[int],
    seed: int,
) -> TaskNetwork:
    """Build a randomly initialised VGG, in float32.

    The convolutions are exactly torchvision's (built here, since importing torchvision takes every
    stage seconds), followed by global average pooling and a linear
    head; weights are drawn as torchvision draws them (He et al. 2015, fan-out).

    Images need sides of at least 32 pixels: five poolings halve them (rounded down), and PyTorch
    refuses smaller ones. The last BatchNorm then sees at least 2 x 2 positions of each image, so
    that a batch of one image has a variance and can be trained on.

    Parameters
    ----------
    arch : {"vgg11", "vgg13", "vgg16", "vgg19"}
        Configuration of Simonyan & Zisserman 2015.
    width : float
        Factor on every layer's number of filters, > 0; each layer keeps at least one filter.
    batch_norm : bool
        Whether a BatchNorm follows every convolution.
    classes : sequence of int
        How many classes each task has.
    seed : int
        Sets the initial weights. Those of the features and of a head depend on no later task.

    Raises
    ------
    InputError
        If ``arch`` is unknown.
    """
    if arch not in ARCHITECTURES:
        raise InputError(f"model.arch: {arch!r} is unknown; allowed: {', '.join(ARCHITECTURES)}")
    channels = [max(1, round(filters * width)) for filters in FILTERS]
    with torch.random.fork_rng(devices=[]):
        features = _convolutions(ARCHITECTURES[arch], channels, batch_norm)
        network = TaskNetwork(features, channels[-1], classes)
        torch.manual_seed(derive_seed(seed, "weights"))
        _initialise(network.features)
        _initialise(network.heads)
    # The same numbers in the order that CPU and GPU convolutions are fastest in.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _convolutions(depths: tuple[int, ...], channels: list[int], batch_norm: bool) -> nn.Sequential:
    """Stack the layers in torchvision's order, so that its layer names hold too."""
    layers: list[nn.Module] = []
    inputs = 3
    for depth, outputs in zip(depths, channels, strict=True):
        for _ in range(depth):
            layers.append(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, dtype=torch.float32))
            if batch_norm:
                layers.append(nn.BatchNorm2d(outputs, dtype=torch.float32))
            layers.append(nn.ReLU(inplace=True))
            inputs = outputs
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return nn.Sequential(*layers)


def _initialise(modules: nn.Module) -> None:
    """Draw weights as ``torchvision.models.VGG`` does."""
    for module in modules.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
