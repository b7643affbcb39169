"""PackNet (Mallya & Lazebnik 2018): each task gets the weights that the ones before left over."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from permafrost.freezing import frozen_weights, plain_copy
from permafrost.hyper import Allowed
from permafrost.models import Head, TaskNetwork
from permafrost.strategies.base import Guard, Lesson, Memory, Phase, Strategy, strategy
from permafrost.training import part_of

# Which task a weight belongs to: its number from 1, or 0 while it is free.
OWNER = "owner/"
# How many tasks own weights for good.
LEARNED = "learned"
RETRAIN = "retrain"


@strategy("packnet")
@dataclass(frozen=True)
class PackNet(Strategy):
    """Prune the weights of the task learned last, retrain the rest, give the next task the pruned.

    Of each convolution, and of a shared head, the share ``prune`` of the weights that the last task
    trained is set to zero, those of the least magnitude; the others are trained again for half a
    task's epochs and then belong to that task for good. The next task trains the free weights.
    Biases and BatchNorms are the first task's, fixed after it was retrained. An old task is
    answered with the weights of later tasks at zero: its outputs never change, and its identity
    must be known.

    Attributes
    ----------
    prune : float
        Share of the weights that is freed, 0..1. 0 leaves nothing for the next task to train but
        its own head. 1 leaves zeros in every convolution: the old task is lost, and no gradient
        passes through them, so that the next one is hardly learned.
    """

    prune: float = 0.5

    hyper: ClassVar[dict[str, Allowed]] = {"prune": (0, 1)}
    heads: ClassVar[tuple[Head, ...]] = ("shared", "multi")
    remark: ClassVar[str] = "needs the task's identity"

    def phases(self, lesson: Lesson) -> list[Phase]:
        """Retrain what pruning has left, then learn the next task."""
        last, new = lesson.learned - 1, lesson.learned
        retrained = Phase(last, (lesson.epochs(last) + 1) // 2, RETRAIN)
        return [retrained, Phase(new, lesson.epochs(new))]

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Hold what is not to be trained."""
        network = lesson.network
        _refuse_others(network)
        packed = _packed(network, self.head)
        if phase.name == RETRAIN:
            owners = self._prune(packed, lesson)
            chosen = {f"{OWNER}{name}": o.to(torch.uint8).cpu() for name, o in owners.items()}
            self._clear(packed, owners, lesson)
            trained = lesson.learned
            # BatchNorm and biases belong to the first task.
            fixed = lesson.learned > 1
        else:
            owners, trained, fixed = _owners(lesson.memory, lesson.device), 0, True
            chosen = {}
        masks = {name: owner != trained for name, owner in owners.items()}
        if fixed:
            masks |= _biases(network, self.head)
        with frozen_weights(network, masks, batch_norms=fixed):
            yield Guard(chosen=chosen)

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Note who owns which weight."""
        if phase.name == RETRAIN:
            owners, learned = guard.chosen, lesson.learned
        else:
            learned = lesson.learned + 1
            owners = {
                name: torch.where(owner == 0, learned, owner).to(torch.uint8)
                for name, owner in lesson.memory.items()
                if name.startswith(OWNER)
            }
        return owners | {LEARNED: torch.tensor(learned, dtype=torch.uint8)}

    def network_for(self, network: TaskNetwork, task: int, memory: Memory) -> TaskNetwork:
        """Return a copy in which only the weights of this and earlier tasks are not zero."""
        if not memory:
            return network
        copied = cast(TaskNetwork, plain_copy(network))
        device = next(copied.parameters()).device
        packed = _packed(copied, self.head)
        learned = int(memory[LEARNED])
        with torch.no_grad():
            for name, owner in _owners(memory, device).items():
                later = owner > task + 1
                if task < learned:  # free weights are the next task's, which may be in training
                    later |= owner == 0
                packed[name].masked_fill_(later, 0.0)
        return copied

    def _clear(
        self, packed: Mapping[str, nn.Parameter], owners: Mapping[str, Tensor], lesson: Lesson
    ) -> None:
        """Set the weights that were freed to 0."""
        del lesson
        with torch.no_grad():
            for name, owner in owners.items():
                packed[name].masked_fill_(owner == 0, 0.0)

    def _prune(self, packed: Mapping[str, nn.Parameter], lesson: Lesson) -> dict[str, Tensor]:
        """Return the owners after the least of the last task's weights were freed."""
        before = _owners(lesson.memory, lesson.device)
        owners = {}
        for name, weight in packed.items():
            everything = torch.full(weight.shape, lesson.learned, device=lesson.device)
            owners[name] = before.get(name, everything)
        scores, kept = self._choice(packed, owners, lesson)
        return {
            name: _freed(owner, lesson.learned, scores[name], kept[name])
            for name, owner in owners.items()
        }

    def _choice(
        self, packed: Mapping[str, nn.Parameter], owners: Mapping[str, Tensor], lesson: Lesson
    ) -> tuple[Mapping[str, Tensor], dict[str, int]]:
        """Return by what the last task's weights are chosen, and how many stay."""
        mine = {name: int((owner == lesson.learned).sum()) for name, owner in owners.items()}
        kept = {name: count - round(self.prune * count) for name, count in mine.items()}
        return {name: weight.detach().abs() for name, weight in packed.items()}, kept


def _freed(owner: Tensor, task: int, scores: Tensor, kept: int) -> Tensor:
    """Return the owners of a layer of which a task keeps the best of its weights."""
    mine = (owner.flatten() == task).nonzero().flatten()
    least = scores.to(owner.device).flatten()[mine].argsort(stable=True)
    freed = mine[least[: max(0, len(mine) - kept)]]
    return owner.flatten().index_fill(0, freed, 0).view(owner.shape)


def _refuse_others(network: TaskNetwork) -> None:
    """Refuse a body of which a later task would move what all tasks share."""
    for name, module in network.features.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            if not isinstance(module, nn.Conv2d | _BatchNorm):
                kind = type(module).__name__
                raise ValueError(
                    f"it shares out convolutions and fixes BatchNorms, but {name}.{own} is of "
                    f"{kind}, which would go on learning"
                )


def _packed(network: TaskNetwork, head: Head) -> dict[str, nn.Parameter]:
    """Return the weights that tasks share: the convolutions', and a shared head's."""
    weights = {
        f"{name}.weight": cast(nn.Parameter, layer.weight)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    if head == "shared":
        weights["heads.0.weight"] = cast(nn.Parameter, network.heads[0].weight)
    return weights


def _biases(network: TaskNetwork, head: Head) -> dict[str, Tensor]:
    """Return masks of the biases that are fixed after the first task."""
    names = [f"{n}.bias" for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    names += ["heads.0.bias"] if head == "shared" else []
    parameters = dict(network.named_parameters())
    return {n: torch.ones_like(parameters[n], dtype=torch.bool) for n in names if n in parameters}


def _owners(memory: Memory, device: torch.device) -> dict[str, Tensor]:
    owners = part_of(memory, OWNER)
    return {name: owner.to(device, torch.int64) for name, owner in owners.items()}
