"""How much a whole run will take on this machine: counted from the parameters, timed by a probe."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import psutil
import torch
from torch import Tensor, nn

from permafrost import __version__
from permafrost.artifacts import load_json, save_json
from permafrost.data import TaskSequence
from permafrost.devices import images_at_once, worker_devices
from permafrost.errors import InputError
from permafrost.experiment import (
    explain_config,
    machine_of,
    new_network,
    run_strategy,
    training_config,
)
from permafrost.explain import conv_layers, saliency_maps, visualize_filters
from permafrost.hyper import number
from permafrost.models import TaskNetwork, measuring
from permafrost.params import Params
from permafrost.paths import project_root
from permafrost.plan import grids, heads, method_run, sweep_runs
from permafrost.ranking import needs_images, needs_maps
from permafrost.ranking.ablation import IMAGES as SILENCED_IMAGES
from permafrost.ranking.criteria import FILTERS, passes_of
from permafrost.runs.spec import RunSpec
from permafrost.schedule import duration
from permafrost.strategies import STRATEGIES, Lesson
from permafrost.strategies.ewc import fisher_memory
from permafrost.strategies.fisher import fisher_diagonal
from permafrost.strategies.si import integral_memory
from permafrost.training import Batch, build_optimizer, cross_entropy
from permafrost.training.steps import PlainStep, RecordedStep, recorder
from permafrost.variants import variant_spec

# What every stage takes, in units of what a process takes to begin: DVC's notes and MLflow too.
_STAGE = 1.5
_START = time.time() - psutil.Process().create_time()  # until this was imported
# How often something is timed, unless it takes longer in seconds.
_CALLS, _ENOUGH = 3, 0.1


@dataclass(frozen=True)
class Costs:
    """What one of each takes on this machine, in seconds.

    Attributes
    ----------
    start : float
        A process until it computes.
    step : float
        A plain training step on a whole batch.
    measured, explained, informed : float
        An image that is answered, explained by a saliency map, or in the Fisher information.
    pictures : float
        The pictures of all filters of a network.
    """

    start: float
    step: float
    measured: float
    explained: float
    informed: float
    pictures: float


@dataclass(frozen=True)
class Estimate:
    """What `dvc repro` takes from scratch.

    Attributes
    ----------
    trainings : int
        Runs of all seeds, first tasks and trials among them.
    steps : int
        Of all trainings.
    stages : dict of str to float
        Seconds of each stage, by the name and in the order that DVC has them.
    megabytes : float
        On the disk, DVC's cache included.
    """

    trainings: int
    steps: int
    stages: dict[str, float]
    megabytes: float

    @property
    def seconds(self) -> float:
        """Return how long it takes until all stages are done."""
        return sum(self.stages.values())

    def __str__(self) -> str:
        """Return it in a line."""
        return (
            f"From scratch: {self.trainings} trainings, {self.steps:,} steps, about "
            f"{duration(self.seconds)} and {self.megabytes:,.0f} MB on this machine; "
            "what is stored is not computed again."
        )


def estimate(params: Params, sequence: TaskSequence, device: torch.device) -> Estimate:
    """Count what the parameters ask for, and time one of each.

    Parameters
    ----------
    params : Params
        All of them.
    sequence : TaskSequence
        The tasks of one seed; only their sizes are read.
    device : torch.device
        Where the stages compute, as :func:`permafrost.devices.prepare_device` set it.
    """
    network = new_network(params, params.seeds[0]).to(device)
    return _Counted(params, sequence, network, device).total(_costs(params, network, device))


def _costs(params: Params, network: TaskNetwork, device: torch.device) -> Costs:
    """Return what one of each takes; timed once for all that costs depend on."""
    path = project_root() / ".permafrost" / "costs.json"
    about = params.model_dump(include={"model", "train", "saliency", "visualize", "runtime"})
    about |= machine_of(params, device) | {
        "image_size": params.split.height_and_width,
        "classes": params.split.sizes,
        "informed": _needs_fisher(params),
        "version": __version__,
    }
    of = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    with suppress(InputError, TypeError, KeyError):
        known = load_json(path)
        if known["of"] == of:
            return Costs(**known["costs"])
    costs = _probe(params, network, device)
    save_json(path, {"of": of, "costs": asdict(costs)})
    return costs


@dataclass(frozen=True)
class _Counted:
    params: Params
    sequence: TaskSequence
    network: TaskNetwork
    device: torch.device

    def total(self, costs: Costs) -> Estimate:
        """Return what all stages take."""
        params, seeds = self.params, self.params.seeds
        runs, trials, variants = self._runs(), self._trials(), self._variants()
        pooled = dict.fromkeys(run for run in runs if run not in variants)
        trained = [*variants, *pooled, *trials]
        steps = len(seeds) * self._steps(0, params.epochs(0))
        steps += sum(self._steps_of(run) for run in trained)
        of_seeds = {"split": 0.0, "train_first": self._first(costs), **self._explaining(costs)}
        stages = {f"{name}@{seed}": cost for name, cost in of_seeds.items() for seed in seeds}
        for seed, run in zip(seeds, variants, strict=True):
            stages[f"train_second@{seed}"] = self._seconds(run, costs)
        sweep = sum(self._seconds(run, costs) for run in pooled)
        tune = sum(self._seconds(run, costs, on_validation=True) for run in trials)
        stages |= {
            "evaluate": 0.0,
            "stability": self._testing_rankings(costs),
            "tune": tune / self._at_once(),
            "sweep": sweep / self._at_once(),
            "report": 0.0,
            "page": 0.0,
        }
        stages = {name: cost + _STAGE * costs.start for name, cost in stages.items()}
        megabytes = self._megabytes(len(trained))
        return Estimate(len(seeds) + len(trained), steps, stages, megabytes)

    def _runs(self) -> list[RunSpec]:
        first = {name: grid[0] for name, grid in grids(self.params).items()}
        return sweep_runs(self.params, dict.fromkeys(heads(self.params), first))

    def _trials(self) -> list[RunSpec]:
        """Return the runs of the first seed by which hyperparameters are chosen."""
        params, tried = self.params, grids(self.params)
        first = {name: grid[0] for name, grid in tried.items()}
        return [
            method_run(params, name, -1, head, first | {name: hyper})
            for head in heads(params)
            for name, grid in tried.items()
            if len(grid) > 1
            for hyper in grid
        ]

    def _variants(self) -> list[RunSpec]:
        return [variant_spec(self.params, seed) for seed in self.params.seeds]

    def _steps(self, task: int, epochs: int) -> int:
        return epochs * -(-len(self.sequence.tasks[task].train) // self.params.train.batch_size)

    def _phases(self, run: RunSpec) -> list[tuple[int, int]]:
        """Return the steps and epochs of a run's trainings."""
        tasks = range(len(self.sequence.tasks))
        if not STRATEGIES[run.strategy].continues:  # all tasks at once
            epochs = self.params.joint_epochs(number(run.hyperparameters, "passes", 1))
            images = sum(len(task.train) for task in self.sequence.tasks)
            return [(epochs * -(-images // self.params.train.batch_size), epochs)]
        strategy = run_strategy(self.params, run, None)
        phases = [phase for task in tasks[1:] for phase in strategy.phases(self._lesson(run, task))]
        return [(self._steps(phase.task, phase.epochs), phase.epochs) for phase in phases]

    def _lesson(self, run: RunSpec, task: int) -> Lesson:
        config = training_config(self.params, self.device)
        return Lesson(self.network, task, self.sequence, config, run.head, 0, self.device)

    def _steps_of(self, run: RunSpec) -> int:
        return sum(steps for steps, _ in self._phases(run))

    def _seconds(self, run: RunSpec, costs: Costs, *, on_validation: bool = False) -> float:
        tasks, made = self.sequence.tasks, STRATEGIES[run.strategy]
        shown = sum(len(task.validation if on_validation else task.test) for task in tasks)
        epochs = sum(epochs for _, epochs in self._phases(run))
        cost = self._steps_of(run) * costs.step * made.step_cost
        cost += epochs * shown * costs.measured
        later = range(1, len(tasks) - 1)  # of these, too, is kept what the method needs
        if run.metric:
            cost += sum(self._ranking(task, [run.metric], costs) for task in later)
        if made.knowledge is fisher_memory:
            cost += sum(self._informed(task) for task in later) * costs.informed
        return cost

    def _informed(self, task: int) -> int:
        """Return how many images the Fisher information is measured of."""
        return min(self.params.consolidate.fisher_images, len(self.sequence.tasks[task].train))

    def _ranking(self, task: int, criteria: list[str], costs: Costs) -> float:
        seconds = self._scoring(task, criteria, costs)
        if any(map(needs_maps, criteria)):
            seconds += self._maps(task, costs) + costs.pictures
        return seconds

    def _maps(self, task: int, costs: Costs) -> float:
        return len(self.sequence.tasks[task].train) * costs.explained

    def _scoring(self, task: int, criteria: list[str], costs: Costs) -> float:
        # Response criteria share their passes.
        passes = {c: passes_of(c) for c in criteria if needs_images(c)}
        counted = sum(p for p in passes.values() if 1 < p < FILTERS) + (1 in passes.values())
        seconds = counted * self._maps(task, costs)
        if FILTERS in passes.values():  # half the network each, on average, and no way back
            filters = sum(layer.out_channels for layer in conv_layers(self.network).values())
            shown = min(SILENCED_IMAGES, len(self.sequence.tasks[task].train))
            seconds += filters * shown * costs.measured / 2
        return seconds

    def _first(self, costs: Costs) -> float:
        epochs, first = self.params.epochs(0), self.sequence.tasks[0]
        return self._steps(0, epochs) * costs.step + epochs * len(first.test) * costs.measured

    def _explaining(self, costs: Costs) -> dict[str, float]:
        """Return what each of the stages between the first task and the second takes."""
        informed = self._informed(0) * costs.informed if _needs_fisher(self.params) else 0.0
        return {
            "saliency": self._maps(0, costs),
            "visualize": costs.pictures,
            "rank": self._scoring(0, self.params.rank.metrics, costs),
            "freeze": 0.0,
            "consolidate": informed,
        }

    def _testing_rankings(self, costs: Costs) -> float:
        """Return what stage stability takes: each ranking in six ways, and the truth."""
        tested = self.params.stability.metrics
        rankings = sum(6 * self._ranking(0, [criterion], costs) for criterion in tested)
        return rankings + (self._ranking(0, ["ablation"], costs) if tested else 0.0)

    def _at_once(self) -> int:
        """Return how many runs of the sweep go on beside each other without being slowed."""
        workers = self.params.sweep.workers
        if self.device.type == "cuda":
            return len(set(worker_devices(self.device, workers)))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return max(1, min(workers, (cores or 1) // self.params.runtime.threads))

    def _megabytes(self, runs: int) -> float:
        weights = sum(value.nbytes for value in self.network.state_dict().values())
        height, width = self.params.split.height_and_width
        filters = sum(layer.out_channels for layer in conv_layers(self.network).values())
        tasks = sum(
            part.images.nbytes
            for task in self.sequence.tasks
            for part in (task.train, task.validation, task.test)
        )
        pictures = filters * 4 * height * width * 4  # one, and a map, of each filter
        made = {STRATEGIES[name].knowledge for name in self.params.sweep.strategies}
        large = len(made & {fisher_memory, integral_memory})  # a number and a centre a weight
        # Weights after both tasks and the path integral, each in the workspace and in DVC's cache;
        # the first task and the pictures are stored once more.
        seed = 2 * ((3 + 2 * large) * weights + pictures + tasks) + 2 * weights + pictures
        return (len(self.params.seeds) * seed + runs * weights) / 1e6


def _needs_fisher(params: Params) -> bool:
    return any(STRATEGIES[name].knowledge is fisher_memory for name in params.sweep.strategies)


def _probe(params: Params, network: TaskNetwork, device: torch.device) -> Costs:
    """Time one of each, on random images."""
    model = network.view("shared", 0, 1)
    config, explain = training_config(params, device), explain_config(params)
    height, width = params.split.height_and_width

    def images(count: int) -> Tensor:
        drawn = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
        return drawn.to(device)

    def labels(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=device)

    batch = Batch(images(config.batch_size), labels(config.batch_size), labels(1), 1, 1)
    # A CPU takes twice as long for twice as many; a GPU is timed with as many as the stages take.
    few = images_at_once(batch.images, on_cpu=8)
    some = 64 if device.type == "cuda" else 2

    def measure() -> None:
        with torch.no_grad(), measuring(model):
            model(images(few))

    def explain_few() -> None:
        saliency_maps(model, images(few), labels(few), explain.method, reading=explain.reading)

    def inform() -> None:
        names = [name for name, _ in model.named_parameters()]
        fisher_diagonal(model, [(images(some), labels(some))], names)

    seconds = partial(_seconds, device)
    measured = seconds(measure) / few
    explained = seconds(explain_few) / few
    pictures = sum(
        _seconds_of_pictures(device, model, name, layer.out_channels, few, images(1)[0])
        for name, layer in conv_layers(model).items()
    )
    fisher = seconds(inform) / some if _needs_fisher(params) else 0.0
    model.train()
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr=0.0, momentum=config.momentum, weight_decay=0.0
    )
    plain = PlainStep(model, optimizer, cross_entropy, None, config.precision)
    record = recorder(device)
    take = RecordedStep(plain, config.batch_size, record) if record else plain
    step = seconds(lambda: take(batch))
    model.eval()
    return Costs(
        _START, step, measured, explained, fisher, pictures * explain.steps * explain.starts
    )


def _seconds_of_pictures(
    device: torch.device, model: nn.Module, layer: str, filters: int, at_once: int, start: Tensor
) -> float:
    """Return what one step of all pictures of a layer takes."""
    few = range(min(filters, at_once))
    return _seconds(device, lambda: visualize_filters(model, layer, few, start=start, steps=1)) * (
        filters / len(few)
    )


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Time something a few times after one that does not count; return the median."""
    found: list[float] = []
    work()
    while len(found) < _CALLS and sum(found) < _ENOUGH:
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - began)
    return median(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
