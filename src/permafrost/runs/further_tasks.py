"""How further tasks are learned by a strategy, from the first task's weights."""

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from permafrost.data import Batches, TaskSequence
from permafrost.errors import NotFiniteError
from permafrost.evaluation.drift import mean_drift, response_drift
from permafrost.explain import conv_layers
from permafrost.models import TaskNetwork
from permafrost.runs.description import Description
from permafrost.runs.network import new_network
from permafrost.runs.outcome import OnEpoch, Outcome, accuracy_facts, row_facts
from permafrost.runs.spec import Settings
from permafrost.strategies.base import Memory, Strategy
from permafrost.strategies.learner import Learner, Progress


def learn_further(
    settings: Settings,
    strategy: Strategy,
    seed: int,
    tasks: TaskSequence,
    first: dict[str, Tensor],
    memory: Memory,
    device: torch.device,
    progress: Progress | None,
    after_epoch: OnEpoch,
) -> Outcome:
    """Learn all tasks but the first, or all at once; a training that diverges is an outcome too.

    Parameters
    ----------
    settings : Settings
        How.
    strategy : Strategy
        By what.
    seed : int
        Of all random draws.
    tasks : TaskSequence
        The images.
    first : dict of str to Tensor
        Weights after the first task.
    memory : dict of str to Tensor
        What the strategy keeps of the first task.
    device : torch.device
        Where to train.
    progress : Progress or None
        Where to go on.
    after_epoch : callable
        Told the progress after each epoch.

    Returns
    -------
    Outcome
        Its facts: those of :func:`accuracy_facts`, ``without_task`` (a row of accuracies where the
        task is not told, or None), ``memory_bytes``, ``filters`` and ``frozen``
        (how many each layer has, and how many were frozen at the end), ``drift`` by layer and
        ``mean_drift``; or ``error`` and the curves.
    """
    network = new_network(settings, tasks, seed).to(device)
    learner = Learner(
        tasks,
        settings.train,
        head=strategy.head,
        seed=seed,
        device=device,
        keep=settings.keep,
        untrained=copy.deepcopy(network.state_dict()),
    )
    progress = progress or Progress(0, [learner.measure(network, 0)])
    try:
        if strategy.continues:
            network.load_state_dict(first)
            if progress.learned == 0:
                progress.rows.append(learner.measure(network, 1))
                progress.learned, progress.memory = 1, memory
        strategy.learn(learner, network, progress, after_epoch)
        facts = _facts(strategy, tasks, first, network, progress, learner)
    except NotFiniteError as error:
        facts = {"error": str(error), "history": progress.history + progress.training.history}
    seconds = progress.seconds + progress.training.seconds
    description = Description.of(
        settings, tasks, learned=progress.learned, head=strategy.head, strategy=type(strategy)
    )
    return Outcome(facts, network.state_dict(), seconds, about=asdict(description))


def _facts(
    strategy: Strategy,
    tasks: TaskSequence,
    first: dict[str, Tensor],
    network: TaskNetwork,
    progress: Progress,
    learner: Learner,
) -> dict[str, Any]:
    frozen = strategy.frozen(network, progress.memory)
    untold = learner.measure_without_task(network, strategy, progress.memory)
    facts = accuracy_facts(progress) | {
        "without_task": row_facts(untold),
        "memory_bytes": strategy.memory_bytes(tasks, progress.memory),
        "frozen": {name: int(mask.sum()) for name, mask in frozen.items()},
        "filters": {name: layer.out_channels for name, layer in conv_layers(network).items()},
    }
    if not strategy.continues:
        return facts
    before = copy.deepcopy(network)
    before.load_state_dict(first)
    after = strategy.network_for(network, 0, progress.memory)
    return facts | _drift(before, after, frozen, tasks, learner.device)


def _drift(
    before: TaskNetwork,
    after: TaskNetwork,
    frozen: dict[str, Tensor],
    tasks: TaskSequence,
    device: torch.device,
) -> dict[str, Any]:
    """Measure how far filters' responses to the first task's test images have moved."""
    layers = {name: layer.out_channels for name, layer in conv_layers(before).items()}
    tests = Batches(tasks.tasks[0].test, tasks.normalization, device)
    drift = response_drift(
        before.view("shared", 0, 1), after.view("shared", 0, 1), tests, list(layers)
    )
    masks = {name: torch.zeros(count, dtype=torch.bool) for name, count in layers.items()} | frozen
    return {
        "drift": {name: mean_drift({name: drift[name]}, masks) for name in layers},
        "mean_drift": mean_drift(drift, masks),
    }
