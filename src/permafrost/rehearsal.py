"""Whether a network can serve what the parameters ask of it, tried on a few random images.

The package's VGG serves all that the package has; any other network, and a user's own criterion or
strategy, is tried before hours of training show that it does not.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from permafrost.data import Batches, LabeledImages, Task, TaskSequence
from permafrost.errors import InputError, printable
from permafrost.experiment import (
    explain_config,
    new_network,
    run_settings,
    run_strategy,
)
from permafrost.explain import conv_layers, saliency_maps, visualize_filters
from permafrost.first_weights import first_weights, weights_path
from permafrost.models import NETWORKS, TaskNetwork
from permafrost.models.vgg import vgg16
from permafrost.params import Params
from permafrost.plan import grids, heads, sweep_runs
from permafrost.ranking import Evidence, needs_images, needs_maps, network_evidence
from permafrost.ranking.criteria import FILTERS, passes_of
from permafrost.ranking.method import frozen_masks, order_layers, show_images
from permafrost.runs import first_task, further_tasks
from permafrost.runs.knowledge import first_lesson
from permafrost.runs.outcome import Outcome
from permafrost.runs.spec import RunSpec, Settings
from permafrost.strategies import STRATEGIES, Memory

T = TypeVar("T")

_CPU = torch.device("cpu")


def rehearse(params: Params, sequence: TaskSequence) -> None:
    """Try the network, and what is to be done with it, on random images.

    Parameters
    ----------
    params : Params
        All of them.
    sequence : TaskSequence
        The tasks; only their sizes are read.

    Raises
    ------
    InputError
        One line that names the key, what cannot be done and why.
    """
    network = new_network(params, params.seeds[0])
    _learn_from_one(params, network, sequence)
    is_known = NETWORKS.home(params.model.arch) == vgg16.__module__
    criteria = [name for name in params.rank.metrics if not is_known or ":" in name]
    strategies = [name for name in params.sweep.strategies if not is_known or ":" in name]
    if is_known and not criteria and not strategies:
        return
    rehearsal = _Rehearsal.of(params, sequence)
    if not is_known:
        rehearsal.try_explanations()
    evidence = network_evidence(rehearsal.network, params.seeds[0])
    for name in criteria:
        rehearsal.attempt(f"rank.metrics: {name}", partial(rehearsal.rank, name, evidence))
    for spec in _a_run_of_each(params, strategies):
        key = f"sweep.strategies: {spec.strategy}"
        rehearsal.attempt(key, partial(rehearsal.learn, spec, evidence))


def _learn_from_one(params: Params, network: TaskNetwork, sequence: TaskSequence) -> None:
    """Refuse a last batch of one image where a norm would see a single value."""
    size = params.train.batch_size
    if not any(len(task.train) % size == 1 for task in sequence.tasks):
        return
    try:
        network.train()(_images(1, params))
    except ValueError as error:
        raise InputError(
            f"train.batch_size: with {size} a task's last batch is one image, which "
            f"{params.model.arch} cannot learn from ({error}); set another, or larger images"
        ) from error


def _images(count: int, params: Params) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, *params.split.height_and_width, generator=generator)


def _a_run_of_each(params: Params, strategies: Iterable[str]) -> list[RunSpec]:
    """Return one run for each strategy and head, and of its twins."""
    first = {name: grid[0] for name, grid in grids(params).items()}
    runs = sweep_runs(params, dict.fromkeys(heads(params), first))
    each = {(run.strategy, run.head, run.twin): run for run in runs if run.strategy in strategies}
    return list(each.values())


@dataclass(frozen=True)
class _Rehearsal:
    """A few random images of two tasks, and the network that has learned the first.

    Attributes
    ----------
    params : Params
        With one epoch of one batch.
    tasks : TaskSequence
        Two classes each, of two images.
    outcome : Outcome
        Of the first task.
    network : TaskNetwork
        After it.
    """

    params: Params
    tasks: TaskSequence
    outcome: Outcome
    network: TaskNetwork

    @classmethod
    def of(cls, params: Params, sequence: TaskSequence) -> "_Rehearsal":
        """Learn the first task."""
        short, images = _shortened(params), _few(params)
        tasks = tuple(
            Task(tuple(names), images, images, images) for names in short.split.classes or ()
        )
        few = replace(sequence, tasks=tasks)
        seed, settings = params.seeds[0], _settings(short)
        outcome = _attempt(
            f"model.arch: {params.model.arch}",
            lambda: first_task.learn_first(settings, seed, few, _CPU, None, lambda _: None),
        )
        network = new_network(short, seed)
        network.load_state_dict(outcome.weights)
        return cls(short, few, outcome, network.eval())

    def attempt(self, key: str, what: Callable[[], T]) -> T:
        """Do something; where it fails, say that the network cannot serve it."""
        return _attempt(key, what, f" cannot serve {self.params.model.arch}")

    def try_explanations(self) -> None:
        """Make a map of the first task, and a filter's picture of the deepest layer."""
        model = self.network.view("shared", 0, 1)
        images, labels = next(self._batches(0).ordered(2))
        config = explain_config(self.params)
        self.attempt(
            f"saliency.method: {config.method}",
            lambda: saliency_maps(model, images, labels, config.method, reading=config.reading),
        )
        *_, deepest = conv_layers(model)
        self.attempt(
            "visualize: activation maximisation",
            lambda: visualize_filters(model, deepest, [0], start=images[0], steps=1),
        )

    def rank(self, criterion: str, evidence: Evidence) -> None:
        """Rank by a criterion, unless it looks at maps alone or takes a pass for each filter."""
        if needs_maps(criterion) or passes_of(criterion) == FILTERS:
            return
        if needs_images(criterion):
            model, classes = self.network.view("shared", 0, 1), len(self.tasks.tasks[0].classes)
            maps = _images(classes, self.params).mean(1)
            scores = show_images(model, self._batches(0), classes, [criterion], maps)
            evidence = replace(evidence, class_scores=scores)
        order_layers(criterion, evidence, explain_config(self.params))

    def learn(self, spec: RunSpec, evidence: Evidence) -> None:
        """Learn the second task."""
        params, tasks, seed = self.params, self.tasks, spec.seed
        masks = None
        if spec.metric is not None:
            _, orders = order_layers("random", evidence, explain_config(params))
            masks = orders if spec.pct is None else frozen_masks(orders, spec.pct)
        strategy = run_strategy(params, spec, masks)
        settings, first = _settings(params), self.outcome.weights
        memory: Memory = {}
        if make := STRATEGIES[spec.strategy].knowledge:
            kept = self.outcome.kept
            memory = make(first_lesson(settings, seed, tasks, self.network, kept, _CPU))
        further_tasks.learn_further(
            settings, strategy, seed, tasks, first, memory, _CPU, None, lambda _: None
        )

    def _batches(self, task: int) -> Batches:
        return Batches(self.tasks.tasks[task].train, self.tasks.normalization, _CPU)


def _shortened(params: Params) -> Params:
    """Return parameters of one epoch, of one step, on two tasks of two classes."""
    return params.model_copy(
        update={
            "split": params.split.model_copy(
                update={"classes": [["a", "b"], ["c", "d"]], "tasks": 2}
            ),
            "train": params.train.model_copy(
                update={"epochs": 1, "batch_size": 4, "precision": "float32"}
            ),
            "consolidate": params.consolidate.model_copy(
                update={"fisher_images": 2, "buffer_images": 2}
            ),
        }
    )


def _settings(params: Params) -> Settings:
    return run_settings(params, first_weights(weights_path(params)), _CPU)


def _few(params: Params) -> LabeledImages:
    images = (_images(4, params) * 255).to(torch.uint8)
    return LabeledImages(images, torch.tensor([0, 1, 0, 1]))


def _attempt(key: str, what: Callable[[], T], cannot: str = " cannot be trained") -> T:
    try:
        return what()
    except (Exception, SystemExit) as error:  # a user's own may fail in any way
        raise InputError(printable(f"{key}{cannot}: {error}")[:500]) from error
