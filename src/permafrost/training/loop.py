"""The one training loop."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from permafrost.data import Batches
from permafrost.errors import NotFiniteError
from permafrost.seeding import derive_seed
from permafrost.training.optimizers import OptimizerName, build_optimizer
from permafrost.training.precision import Precision
from permafrost.training.steps import (
    Batch,
    Objective,
    Observer,
    PlainStep,
    RecordedStep,
    Step,
    cross_entropy,
    recorder,
)

# Given a batch, what a method draws for it besides.
Draw = Callable[[Batch], tuple[Tensor, ...]]


@dataclass(frozen=True)
class TrainingConfig:
    """How one task is trained.

    Attributes
    ----------
    epochs : int
        Passes over the training images, >= 0; 0 leaves the network as it is.
    optimizer : {"sgd", "adam", "adamw"}
        A fresh one is made for each task.
    lr, momentum, weight_decay : float
        Of the optimizer.
    batch_size : int
        Images per step.
    flip : bool
        Whether images are flipped at random.
    padding : int
        Zero padding, in pixels, of the random crops; 0 for none.
    precision : {"float32", "tf32", "bfloat16"}
        What the network computes in while it is trained; it is measured in true float32.
    """

    epochs: int = 10
    optimizer: OptimizerName = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 64
    flip: bool = False
    padding: int = 4
    precision: Precision = "float32"


class TrainingDiverged(NotFiniteError):
    """The loss is not finite, or what a training has made of the network is not."""


@dataclass
class TrainingState:
    """All that a training needs to go on after an epoch as if it had never stopped.

    Attributes
    ----------
    epoch : int
        Epochs done.
    tensors : dict of str to Tensor
        The model's, the optimizer's, the generator's and the observer's state.
    history : list of dict
        A row for each epoch: ``epoch``, ``train_loss`` (mean of the objective, in nats),
        ``train_accuracy`` (0..1, on the augmented images while the weights move) and what
        ``measure`` returned.
    seconds : float
        How long the epochs took, without measuring.
    """

    epoch: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    model: nn.Module,
    batches: Batches,
    config: TrainingConfig,
    *,
    generator: torch.Generator,
    objective: Objective = cross_entropy,
    observer: Observer | None = None,
    draw: Draw | None = None,
    measure: Callable[[], dict[str, Any]] | None = None,
    resume: TrainingState | None = None,
    on_epoch: Callable[[TrainingState], None] | None = None,
) -> list[dict[str, Any]]:
    """Train a model on one task.

    A training has diverged, and ends after the epoch, if the loss of a step is not finite, or if a
    weight, a statistic of a BatchNorm, a number of the optimizer or of the observer or (by
    ``measure``) a logit is not: then no later loss need show it. A loss that is large but finite is
    a bad training, which its accuracy tells.

    Parameters
    ----------
    model : nn.Module
        Maps images (N, 3, H, W) to logits; trained in place and left in eval mode.
    batches : Batches
        The task's training images.
    config : TrainingConfig
        Epochs, optimizer, batch size and augmentation.
    generator : torch.Generator
        Draws order and augmentation; on the CPU, so that they do not depend on the device.
    objective : callable, optional
        Given the model and a :class:`Batch`, the loss to minimise, and the logits and labels of
        which the training accuracy is made.
    observer : Observer, optional
        Sees every step.
    draw : callable, optional
        Given a batch, what the objective needs for it besides, the same shapes each time.
    measure : callable, optional
        Called after each epoch, model in eval mode; what it returns joins the epoch's row.
    resume : TrainingState, optional
        Goes on from there.
    on_epoch : callable, optional
        Given the state after each epoch, to store it and to show progress.

    Dropout and the like draw from PyTorch's global generators, which each epoch seeds for itself:
    an epoch draws the same whatever ran before it. They are put back after it.

    Returns
    -------
    list of dict
        The history, a row for each epoch.

    Raises
    ------
    TrainingDiverged
        If the training diverges; names the step or the epoch, and the learning rate.
    ValueError
        If there are no images, or PyTorch refuses a batch: a BatchNorm needs more than one value
        per channel, so that a network that reduces images to single values above a BatchNorm
        cannot learn from a (last) batch of one image. The networks of :mod:`permafrost.models` can.
    """
    optimizer = build_optimizer(
        config.optimizer,
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    state = resume or TrainingState()
    seed, device = generator.initial_seed(), batches.images.device
    if state.tensors:
        _restore(state.tensors, model, optimizer, generator, observer)
    plain = PlainStep(model, optimizer, objective, observer, config.precision)
    record = recorder(device) if plain.is_recordable else None
    take: Step = RecordedStep(plain, config.batch_size, record) if record else plain
    for epoch in range(state.epoch + 1, config.epochs + 1):
        began = time.perf_counter()
        model.train()
        drawn = batches.epoch(
            generator, config.batch_size, flip=config.flip, padding=config.padding
        )
        steps = (Batch(*items, epoch, step) for step, items in enumerate(drawn, start=1))
        if draw:
            steps = (replace(batch, drawn=draw(batch)) for batch in steps)
        with _noise_of(seed, epoch, device):
            row = train_epoch(steps, take, config.lr)
        state.seconds += time.perf_counter() - began
        model.eval()
        tensors = _snapshot(model, optimizer, generator, observer)
        about = f"after epoch {epoch} with train.lr={config.lr}"
        _check_finite(tensors, about)
        try:
            measured = measure() if measure else {}
        except NotFiniteError as error:
            raise TrainingDiverged(f"{error} {about}") from error
        state.history.append({"epoch": epoch} | row | measured)
        state.epoch = epoch
        state.tensors = tensors
        if on_epoch:
            on_epoch(state)
    model.eval()
    return state.history


@contextmanager
def _noise_of(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Within the block, draw an epoch's own noise from the global generators."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "noise", epoch))
        yield


def train_epoch(steps: Iterable[Batch], take: Step, lr: float) -> dict[str, float]:
    """Take the steps of one epoch.

    Parameters
    ----------
    steps : iterable of Batch
        The epoch's batches.
    take : Step
        Learns from one.
    lr : float
        The learning rate, for messages.

    Returns
    -------
    dict of str to float
        ``train_loss`` and ``train_accuracy``, means over the images.

    Raises
    ------
    TrainingDiverged
        If the loss is not finite.
    ValueError
        If there are no steps.
    """
    # Read at the end alone: to read a number waits for the device.
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    sizes: list[int] = []
    for batch in steps:
        loss, right, count = take(batch)
        losses.append(loss)
        correct.append(right)
        sizes.append(count)
    if not losses:
        raise ValueError("there are no images to train on")
    found = torch.stack(losses).tolist()
    for step, value in enumerate(found, start=1):
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the loss is {value} at step {step} of epoch {batch.epoch} with train.lr={lr}"
            )
    total = sum(value * size for value, size in zip(found, sizes, strict=True))
    return {
        "train_loss": total / sum(sizes),
        "train_accuracy": int(torch.stack(correct).sum()) / sum(sizes),
    }


def _check_finite(tensors: Mapping[str, Tensor], about: str) -> None:
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise TrainingDiverged(f"{name} is not finite {about}")


def _snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    observer: Observer | None,
) -> dict[str, Tensor]:
    """Copy all state into one flat dict, which safetensors can hold."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if value is not None:
                tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    tensors["generator"] = generator.get_state()
    if observer:
        tensors |= {f"observer/{name}": value for name, value in observer.tensors.items()}
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _restore(
    tensors: dict[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    observer: Observer | None,
) -> None:
    """Put a :func:`_snapshot` back."""
    model.load_state_dict(part_of(tensors, "model/"))
    if observer:
        for name, value in part_of(tensors, "observer/").items():
            observer.tensors[name].copy_(value)
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, value in part_of(tensors, "optimizer/").items():
        index, key = name.split("/")
        optimizer_state.setdefault(int(index), {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for place, state in optimizer_state.items():
        like = parameters[place]
        for key, value in state.items():
            if value.shape == like.shape:  # also in memory: a file holds all in one format
                state[key] = torch.empty_like(like, dtype=value.dtype, device="cpu").copy_(value)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    generator.set_state(tensors["generator"])


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by their names without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
