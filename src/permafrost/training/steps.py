"""One step of a training: taken operation by operation, or recorded on a GPU and replayed."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.training.precision import Precision, computing_in, float32_of

# As many as PyTorch's guide takes before it records: libraries prepare themselves in them.
_WARM_UP = 3


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes
    ----------
    images : Tensor, shape (B, 3, H, W)
        Augmented and normalised.
    labels : Tensor of int64, shape (B,)
        Right answers.
    positions : Tensor of int64, shape (B,)
        Where the images stand in the data set.
    epoch, step : int
        From 1.
    drawn : tuple of Tensor
        What a method draws for the step besides.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    epoch: int
    step: int
    drawn: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return all that changes from step to step."""
        return (self.images, self.labels, self.positions, *self.drawn)


# Given the model and a batch: the loss to minimise, and the logits and labels that are compared.
Objective = Callable[[nn.Module, Batch], tuple[Tensor, Tensor, Tensor]]
Declared = TypeVar("Declared", bound=Objective)

# Whose modules do the same operations on every batch.
_KNOWN = {"permafrost", "torch", "torchvision"}


def recordable(objective: Declared) -> Declared:
    """Declare that a GPU may record a step with this objective and replay it.

    It does the same tensor operations on every batch and changes nothing else: it reads no number
    back, counts no steps, and draws nothing by generators of its own.
    """
    objective.recordable = True  # type: ignore[attr-defined]
    return objective


@recordable
def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean cross entropy of a batch, in nats: the plain objective.

    Of a single class it is 0 and has no gradient: only weight decay then moves the weights.
    """
    logits = model(batch.images)
    return F.cross_entropy(logits, batch.labels), logits, batch.labels


class Observer(Protocol):
    """Watches the steps of a training; its state goes on with the training's.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Its state.

    With an attribute ``recordable`` that is true, its steps may be recorded on a GPU, as those of
    an objective that :func:`recordable` declares.
    """

    tensors: dict[str, Tensor]

    def before_step(self) -> None:
        """See the gradients, and the weights that the step will change."""

    def after_step(self) -> None:
        """See the changed weights."""


class Step(Protocol):
    """Learns from a batch."""

    def __call__(self, batch: Batch) -> "Results":
        """Return the loss, in nats, the number of right answers and that of all.

        The first two stay on the device.
        """


Results = tuple[Tensor, Tensor, int]


@dataclass(frozen=True)
class PlainStep:
    """A step, operation by operation: what every other way of taking it has to equal.

    Attributes
    ----------
    model : nn.Module
        In training mode.
    optimizer : torch.optim.Optimizer
        Moves the weights.
    objective, observer
        As in :func:`permafrost.training.fit`.
    precision : {"float32", "tf32", "bfloat16"}
        What the network computes in.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    observer: Observer | None
    precision: Precision

    def __call__(self, batch: Batch) -> Results:
        """Learn from a batch."""
        self.optimizer.zero_grad(set_to_none=True)
        with float32_of(self.precision):
            with computing_in(self.precision, batch.images.device):
                loss, logits, labels = self.objective(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if self.observer:
                self.observer.before_step()
            self.optimizer.step()
            if self.observer:
                self.observer.after_step()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum(), len(labels)

    @property
    def is_recordable(self) -> bool:
        """Return whether all that takes part in a step does the same on every batch.

        Modules of torch, torchvision and this package do; others, and all objectives and observers,
        have to say so by an attribute ``recordable``.
        """
        parts = [self.objective, *([self.observer] if self.observer else [])]
        parts += [m for m in self.model.modules() if _home(m) not in _KNOWN]
        return all(getattr(part, "recordable", False) for part in parts)

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Put back, after the block, all that steps move."""
        moving = [*self.model.parameters(), *self.model.buffers(), *self._states()]
        moving += self.observer.tensors.values() if self.observer else ()
        before = [(tensor, tensor.detach().clone()) for tensor in moving]
        known = {id(tensor) for tensor in moving}
        yield
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)
            # An optimizer makes its state in its first step; all of it begins at zero.
            for tensor in self._states():
                if id(tensor) not in known:
                    tensor.zero_()

    def _states(self) -> list[Tensor]:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value for value in states if isinstance(value, Tensor)]


def _home(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


# Given operations: what does them again, and the tensors that it writes their results into; or
# nothing, where they cannot be recorded.
Recorder = Callable[[Callable[[], Results]], tuple[Callable[[], None], Results] | None]


class RecordedStep:
    """Steps of one size, recorded once and replayed; what an epoch leaves over is taken plainly.

    To record moves nothing: the first whole batch is replayed like all others, so that a training
    that goes on after an epoch takes each step as one that was never stopped.

    Parameters
    ----------
    step : PlainStep
        What to record, which ``is_recordable``.
    size : int
        Images in a whole batch.
    record : callable
        See :func:`on_gpu`.
    """

    def __init__(self, step: PlainStep, size: int, record: Recorder) -> None:
        self._plain = step
        self._size = size
        self._record = record
        self._own: Batch | None = None
        self._recorded: tuple[Callable[[], None], Results] | None = None

    def __call__(self, batch: Batch) -> Results:
        """Learn from a batch."""
        if len(batch.labels) == self._size and self._own is None:
            self._prepare(batch)
        if len(batch.labels) != self._size or self._recorded is None or self._own is None:
            return self._plain(batch)
        replay, results = self._recorded
        for own, given in zip(self._own.tensors, batch.tensors, strict=True):
            own.copy_(given)
        replay()
        loss, correct, count = results
        return loss.clone(), correct.clone(), count  # the next step writes over them

    def _prepare(self, batch: Batch) -> None:
        images, labels, positions, *drawn = (tensor.clone() for tensor in batch.tensors)
        own = replace(batch, images=images, labels=labels, positions=positions, drawn=tuple(drawn))
        self._own = own
        with self._plain.unmoved():
            self._recorded = self._record(lambda: self._plain(own))
        if self._recorded is None:
            warnings.warn(
                "a step of this training reads numbers back from the GPU, so that its operations "
                "are launched one by one, which takes several times as long",
                stacklevel=2,
            )


def recorder(device: torch.device) -> Recorder | None:
    """Return what records steps on a device, if anything does."""
    return partial(on_gpu, device) if device.type == "cuda" else None


def on_gpu(
    device: torch.device, operations: Callable[[], Results]
) -> tuple[Callable[[], None], Results] | None:
    """Record operations as a CUDA graph, which the host launches as one.

    Parameters
    ----------
    device : torch.device
        The GPU that they compute on.
    operations : callable
        Is called a few times.

    Returns
    -------
    tuple of (callable, tuple of Tensor), or None
        What replays them, and the tensors that it writes the results into; None where they wait
        for the GPU, which cannot be recorded.
    """
    with torch.cuda.device(device), torch.random.fork_rng([device]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP - 1):
                operations()
            waits = _waits(operations)
        torch.cuda.current_stream().wait_stream(side)
        if waits:
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            results = operations()
    return graph.replay, results


def _waits(operations: Callable[[], object]) -> bool:
    """Do operations; return whether one of them waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            operations()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return False
