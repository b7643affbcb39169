"""The one training loop."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.data import Batches
from permafrost.training.optimizers import OptimizerName, build_optimizer

Answer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainingConfig:
    """How one task is trained.

    Attributes
    ----------
    epochs : int
        Passes over the training images, >= 0.
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
    """

    epochs: int = 10
    optimizer: OptimizerName = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 64
    flip: bool = False
    padding: int = 4


class TrainingDiverged(RuntimeError):
    """The loss is not a finite number."""


@dataclass
class TrainingState:
    """All that a training needs to go on after an epoch as if it had never stopped.

    Attributes
    ----------
    epoch : int
        Epochs done.
    tensors : dict of str to Tensor
        The model's, the optimizer's and the generator's state.
    history : list of dict
        A row for each epoch: ``epoch``, ``train_loss`` (mean cross entropy in nats),
        ``train_accuracy`` (0..1, on the augmented images while the weights move) and what
        ``measure`` returned.
    """

    epoch: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    model: nn.Module,
    batches: Batches,
    config: TrainingConfig,
    *,
    generator: torch.Generator,
    answer: Answer | None = None,
    measure: Callable[[], dict[str, Any]] | None = None,
    resume: TrainingState | None = None,
    on_epoch: Callable[[TrainingState], None] | None = None,
) -> list[dict[str, Any]]:
    """Train a model on one task.

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
    answer : callable, optional
        Maps the model's logits and the labels to those that are compared (several heads in one
        batch); the loss is the cross entropy of what it returns.
    measure : callable, optional
        Called after each epoch, model in eval mode; what it returns joins the epoch's row.
    resume : TrainingState, optional
        Goes on from there.
    on_epoch : callable, optional
        Given the state after each epoch, to store it and to show progress.

    Returns
    -------
    list of dict
        The history, a row for each epoch.

    Raises
    ------
    TrainingDiverged
        If the loss is not finite; names the step and the learning rate.
    """
    optimizer = build_optimizer(
        config.optimizer,
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    state = resume or TrainingState()
    if state.tensors:
        _restore(state.tensors, model, optimizer, generator)
    for epoch in range(state.epoch + 1, config.epochs + 1):
        row = {"epoch": epoch} | _train_epoch(model, batches, config, optimizer, generator, answer)
        model.eval()
        state.history.append(row | (measure() if measure else {}))
        state.epoch = epoch
        state.tensors = _snapshot(model, optimizer, generator)
        if on_epoch:
            on_epoch(state)
    model.eval()
    return state.history


def _train_epoch(
    model: nn.Module,
    batches: Batches,
    config: TrainingConfig,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    answer: Answer | None,
) -> dict[str, float]:
    model.train()
    total_loss, total_correct = 0.0, 0
    epoch = batches.epoch(generator, config.batch_size, flip=config.flip, padding=config.padding)
    for step, (images, labels) in enumerate(epoch, start=1):
        optimizer.zero_grad(set_to_none=True)
        logits = model(images)
        if answer:
            logits, labels = answer(logits, labels)
        loss = F.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        batch_loss = loss.item()
        if not math.isfinite(batch_loss):
            raise TrainingDiverged(
                f"the loss is {batch_loss} at step {step} of an epoch with train.lr={config.lr}"
            )
        total_loss += batch_loss * len(labels)
        total_correct += int((logits.detach().argmax(1) == labels).sum())
    return {"train_loss": total_loss / len(batches), "train_accuracy": total_correct / len(batches)}


def _snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    """Copy all state into one flat dict, which safetensors can hold."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if value is not None:
                tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    tensors["generator"] = generator.get_state()
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _restore(
    tensors: dict[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    """Put a :func:`_snapshot` back."""
    prefix = "model/"
    model.load_state_dict(
        {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    )
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            optimizer_state.setdefault(int(index), {})[key] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    generator.set_state(tensors["generator"])
