"""Circuits: the best filters and the weights between them answer the old task, alone."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.freezing import frozen_weights, plain_copy
from permafrost.hyper import Allowed
from permafrost.models import TaskNetwork
from permafrost.models.channels import Channels, read_by, trace_channels
from permafrost.ranking.layer_shares import circuit_sizes
from permafrost.strategies.base import (
    FilterRanking,
    Guard,
    Lesson,
    Memory,
    Phase,
    part_with,
    strategy,
)
from permafrost.strategies.lwf import distillation
from permafrost.strategies.rescaling import rescale, weight_norms
from permafrost.strategies.sized import CHANCE, SHARE_TWINS, Sized
from permafrost.strategies.soft import by_rank
from permafrost.training import Batch, Objective, part_of, recordable

CIRCUIT = "circuit/"
RELEARN = "relearn"
TEACHERS = ("network", "labels")
_TEMPERATURE = 2.0
# The bias of an output that does not answer.
_NEVER = -1e30

# The chosen channels of each group.
Chosen = dict[str, Tensor]


@strategy("circuit")
@dataclass(frozen=True)
class Circuit(Sized):
    """Freeze the best filters with all that is between them; the old task is answered by it alone.

    Of each layer the best filters are chosen, as many as ``shares`` says (:func:`circuit_sizes`),
    what earlier circuits hold of the layer added to its share: the weights between them are the
    circuit. All else is set to 0, and the circuit learns its task again for some epochs, norms and
    head of its own with it. Then its weights hold still. The next task has the whole network back,
    as it was but for the circuit's weights: it changes all others, those from and to chosen filters
    included, and norms and head of its own. An old task is answered with all weights outside its
    circuit at 0, by its own norms, biases and head: its answers never change, and its identity must
    be known. A later circuit may contain weights of earlier ones, which it reads but does not
    change. Filters whose maps are added share one choice.

    Before a circuit relearns, the weights of each layer that holds none of an earlier circuit are
    scaled to the norm that the whole layer had, and the norm's statistics with them. Under an
    expanding head an old task is answered among the classes that were known when it was learned.

    Attributes
    ----------
    relearn : float
        Epochs.
    teacher : {"network", "labels"}
        What it relearns: the whole network's answers (softened at temperature 2), or the labels.
    ranking : callable
        What ranks the filters.
    """

    relearn: float = 3
    teacher: str = "network"
    ranking: FilterRanking = field(kw_only=True)

    hyper: ClassVar[dict[str, Allowed]] = {
        **Sized.hyper,
        "relearn": (0, 1000),
        "teacher": TEACHERS,
    }
    ranks: ClassVar[bool] = True
    twins: ClassVar[tuple[str, ...]] = (CHANCE, *SHARE_TWINS)
    step_cost: ClassVar[float] = 1.1
    remark: ClassVar[str] = "needs the task's identity"

    def phases(self, lesson: Lesson) -> list[Phase]:
        """Let the circuit of the last task relearn it, then learn the next task."""
        relearned = Phase(lesson.learned - 1, round(self.relearn), RELEARN)
        return [relearned, Phase(lesson.learned, lesson.epochs(lesson.learned))]

    @contextmanager
    def while_learning(self, lesson: Lesson, phase: Phase) -> Iterator[Guard]:
        """Hold the circuits' weights, and while one relearns all that is outside it at 0."""
        channels = trace_channels(lesson.network.features, "features.")
        held = _held(lesson.network, channels, lesson.memory)
        if phase.name != RELEARN:
            with frozen_weights(lesson.network, held):
                yield Guard()
            return
        chosen = self._choose(lesson, channels, held)
        view, classes = lesson.view(phase.task), lesson.network.classes
        known = sum(classes[: lesson.learned]) if self.head == "expanding" else classes[phase.task]
        teacher = cast(nn.Sequential, plain_copy(view)) if self.teacher == "network" else None
        norms = weight_norms(lesson.network)
        clear_outside(lesson.network, channels, chosen)
        rescale(lesson.network, {n: v for n, v in norms.items() if not held[f"{n}.weight"].any()})
        weights = _between(lesson.network, channels, chosen)
        masks = {name: ~inside | held[name] for name, inside in weights.items()}
        biases, outside = _outside(lesson.network, channels, chosen)
        with frozen_weights(lesson.network, masks | biases, batch_norms=outside):
            yield Guard(
                _relearning(teacher, known),
                chosen={f"{CIRCUIT}{phase.task}/channels/{n}": m.cpu() for n, m in chosen.items()},
            )

    def after_phase(self, lesson: Lesson, phase: Phase, guard: Guard) -> Memory:
        """Keep the circuit's channels, norms, biases and head; give the network the rest back."""
        if phase.name != RELEARN:
            return lesson.memory
        channels = trace_channels(lesson.network.features, "features.")
        chosen = part_of(guard.chosen, f"{CIRCUIT}{phase.task}/channels/")
        own = self._own_state(lesson.network, channels, phase.task)
        weights = _between(lesson.network, channels, chosen)
        whole = {name: value.to(lesson.device) for name, value in lesson.start.items()}
        now = lesson.network.state_dict()
        for name, inside in weights.items():
            whole[name] = torch.where(inside.to(lesson.device), now[name], whole[name])
        lesson.network.load_state_dict(whole)
        kept = {f"{CIRCUIT}{phase.task}/own/{name}": value for name, value in own.items()}
        return lesson.memory | part_with(guard.chosen, CIRCUIT) | kept

    def measured(self, lesson: Lesson, phase: Phase) -> Collection[int]:
        """Leave out earlier tasks while a circuit relearns, which has set their weights to 0."""
        return [phase.task] if phase.name == RELEARN else super().measured(lesson, phase)

    def network_for(self, network: TaskNetwork, task: int, memory: Memory) -> TaskNetwork:
        """Return a copy in which the circuit of a task that has one answers alone."""
        chosen = part_of(memory, f"{CIRCUIT}{task}/channels/")
        if not chosen:
            return network
        copied = cast(TaskNetwork, plain_copy(network))
        channels = trace_channels(copied.features, "features.")
        own = part_of(memory, f"{CIRCUIT}{task}/own/")
        copied.load_state_dict(own, strict=False)
        clear_outside(copied, channels, chosen)
        with torch.no_grad():
            for head in copied.heads[task + 1 :]:
                assert isinstance(head, nn.Linear)
                head.weight.zero_()
                head.bias.fill_(_NEVER)
        return copied

    def _own_state(self, network: TaskNetwork, channels: Channels, task: int) -> Memory:
        """Return what a task has of its own: norms, biases and the heads that answer."""
        heads = {"shared": [0], "multi": [task], "expanding": range(task + 1)}[self.head]
        answering = tuple(f"heads.{index}." for index in heads)
        weights = {f"{name}.weight" for name in channels.gives}
        return {
            name: value.cpu().clone()
            for name, value in network.state_dict().items()
            if name.startswith(("features.", *answering)) and name not in weights
        }

    def _choose(self, lesson: Lesson, channels: Channels, held: Mapping[str, Tensor]) -> Chosen:
        """Return the circuit's channels, so many that it takes its part of the weights."""
        orders = self.ranking.orders(lesson, by_chance=self.twin == CHANCE)
        best = _group_orders(channels, orders)
        convs = _convolutions(lesson.network, channels)
        free = {name: ~held[f"{name}.weight"] for name in convs}
        shares = self.layer_shares(lesson, free)
        widths, total = channels.widths, sum(conv.weight.numel() for conv in convs.values())

        def first(sizes: Mapping[str, int]) -> Chosen:
            return {
                group: torch.zeros(width, dtype=torch.bool).index_fill(
                    0, best[group][: sizes[group]], True
                )
                for group, width in widths.items()
            }

        def new_weights(sizes: Mapping[str, int]) -> int:
            inside = _between(lesson.network, channels, first(sizes))
            return sum(int((m.to(lesson.device) & ~held[n]).sum()) for n, m in inside.items())

        # What earlier circuits hold is read free, so that a full layer is read whole.
        for name, weights in free.items():
            shares[name] += 1 - float(weights.double().mean())
        by_group = _group_shares(channels, convs, shares)
        wanted = self.part(lesson) * total
        return first(circuit_sizes(widths, by_group, new_weights, wanted))


def _relearning(teacher: nn.Sequential | None, known: int) -> Objective:
    """Return the objective of a circuit: to answer as the whole network, or the labels.

    Parameters
    ----------
    teacher : nn.Sequential or None
        The whole network's classifier.
    known : int
        How many logits there are but for those of tasks that are not learned yet.
    """
    if teacher is not None:
        teacher.eval().requires_grad_(False)

    @recordable
    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logits = model(batch.images)[:, :known]
        if teacher is None:
            return F.cross_entropy(logits, batch.labels), logits, batch.labels
        with torch.no_grad():
            answers = teacher(batch.images)[:, :known]
        return distillation([logits], answers, _TEMPERATURE), logits, batch.labels

    return objective


def _convolutions(network: TaskNetwork, channels: Channels) -> dict[str, nn.Conv2d]:
    layers = dict(network.named_modules())
    return {name: cast(nn.Conv2d, layers[name]) for name in channels.gives}


def _between(network: TaskNetwork, channels: Channels, chosen: Mapping[str, Tensor]) -> Chosen:
    """Mark the convolutions' weights between chosen channels, by the parameters' names."""
    masks = {}
    for name, conv in _convolutions(network, channels).items():
        read = channels.reads[name]
        inputs = torch.ones(conv.in_channels, dtype=torch.bool) if read is None else chosen[read]
        both = chosen[channels.gives[name]][:, None] & read_by(conv, inputs)
        masks[f"{name}.weight"] = both[:, :, None, None].expand_as(conv.weight)
    device = next(network.parameters()).device
    return {name: mask.to(device) for name, mask in masks.items()}


def _outside(
    network: TaskNetwork, channels: Channels, chosen: Mapping[str, Tensor]
) -> tuple[Chosen, Chosen]:
    """Mark the biases of the convolutions, and the norms' channels, that are not chosen."""
    device = next(network.parameters()).device
    without = {group: ~mask.to(device) for group, mask in chosen.items()}
    biases = {
        f"{name}.bias": without[channels.gives[name]]
        for name, conv in _convolutions(network, channels).items()
        if conv.bias is not None
    }
    return biases, {name: without[group] for name, group in channels.norms.items()}


@torch.no_grad()
def clear_outside(network: TaskNetwork, channels: Channels, chosen: Mapping[str, Tensor]) -> None:
    """Set all to 0 that is outside a circuit: weights, biases, and the norms' γ and β.

    Parameters
    ----------
    network : TaskNetwork
        Plain.
    channels : Channels
        Of its body.
    chosen : mapping of str to Tensor of bool
        The circuit's channels, by group.
    """
    parameters = dict(network.named_parameters())
    biases, norms = _outside(network, channels, chosen)
    for name, inside in _between(network, channels, chosen).items():
        parameters[name].masked_fill_(~inside, 0.0)
    norms = {f"{n}.{part}": mask for n, mask in norms.items() for part in ("weight", "bias")}
    for name, outside in (biases | norms).items():
        if name in parameters:
            parameters[name].masked_fill_(outside, 0.0)


def _held(network: TaskNetwork, channels: Channels, memory: Memory) -> Chosen:
    """Mark the weights of all circuits so far."""
    held = {
        f"{name}.weight": torch.zeros_like(conv.weight, dtype=torch.bool)
        for name, conv in _convolutions(network, channels).items()
    }
    tasks = {name.split("/")[1] for name in memory if name.startswith(CIRCUIT)}
    for task in tasks:
        chosen = part_of(memory, f"{CIRCUIT}{task}/channels/")
        for name, inside in _between(network, channels, chosen).items():
            held[name] |= inside
    return held


def _group_orders(channels: Channels, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Order the channels of each group by the mean importance of their filters."""
    sums: dict[str, Tensor] = {}
    for name, group in channels.gives.items():
        sums[group] = sums.get(group, torch.zeros(())) + by_rank(orders[name])
    return {group: total.argsort(descending=True, stable=True) for group, total in sums.items()}


def _group_shares(
    channels: Channels, convs: Mapping[str, nn.Conv2d], shares: Mapping[str, float]
) -> dict[str, float]:
    """Return the share of the weights of each group's convolutions."""
    kept, total = dict.fromkeys(channels.widths, 0.0), dict.fromkeys(channels.widths, 0)
    for name, conv in convs.items():
        group = channels.gives[name]
        kept[group] += shares[name] * conv.weight.numel()
        total[group] += conv.weight.numel()
    return {group: kept[group] / total[group] for group in total}
