"""Which trainings the parameters ask for, and how each is done.

The bridge from params.yaml to the library: it turns a cell's description into a request that
:mod:`permafrost.cells` can key, store and resume.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from permafrost.cells import CellRequest, CellStore, machine
from permafrost.data import Batches, TaskSequence
from permafrost.evaluation import (
    Accuracy,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    mean_drift,
    response_drift,
)
from permafrost.explain import conv_layers
from permafrost.models import Head, TaskNetwork, build_network
from permafrost.params import Params
from permafrost.ranking import frozen_mask, get_metric
from permafrost.strategies import (
    Finetune,
    Freeze,
    Joint,
    Learner,
    LinearProbe,
    Progress,
    Strategy,
)
from permafrost.strategies.reranking import ExplainConfig, rank_network
from permafrost.training import TrainingConfig

OnEpoch = Callable[[Progress], None]


@dataclass(frozen=True)
class CellSpec:
    """One cell of the comparison.

    Attributes
    ----------
    strategy : str
        A name in ``STRATEGIES``.
    seed : int
        One of ``seeds``.
    head : {"shared", "multi", "expanding"}
        How the network answers.
    metric : str or None
        What ranks the filters; ``freeze`` only.
    pct : float or None
        Share of every layer's filters that is frozen, 0..1; ``freeze`` only.
    passes : int or None
        Epochs as a multiple of one task's; ``joint`` only.
    """

    strategy: str
    seed: int
    head: Head
    metric: str | None = None
    pct: float | None = None
    passes: int | None = None

    @property
    def name(self) -> str:
        """Return a short name for people."""
        parts = [self.strategy, self.metric, None if self.pct is None else f"{self.pct:.0%}"]
        if self.passes is not None:
            parts.append(f"{self.passes}x epochs")
        return " ".join(part for part in [*parts, self.head, f"seed {self.seed}"] if part)


@dataclass(frozen=True)
class CellInputs:
    """What a cell of one seed starts from.

    Attributes
    ----------
    tasks : TaskSequence
        The images.
    tasks_digest : str
        Hash of the file that they came from.
    first : dict of str to Tensor
        Weights after the first task.
    first_digest : str
        Hash of their file.
    """

    tasks: TaskSequence
    tasks_digest: str
    first: dict[str, Tensor]
    first_digest: str


Masks = Mapping[str, Tensor]


def sweep_cells(params: Params) -> list[CellSpec]:
    """Return every cell of the sweep: strategies x metrics x pcts x heads x seeds.

    ``joint`` comes in both lengths, under each head and under one softmax of all classes.
    """
    sweep = params.sweep
    cells = []
    for head, seed in product(cast(list[Head], sweep.heads), params.seeds):
        for strategy in sweep.strategies:
            if strategy == "freeze":
                cells += [
                    CellSpec(strategy, seed, head, metric, pct)
                    for metric, pct in product(sweep.metrics, sweep.pcts)
                ]
            elif strategy != "joint":
                cells.append(CellSpec(strategy, seed, head))
    if "joint" in sweep.strategies:
        heads = dict.fromkeys([*cast(list[Head], sweep.heads), cast(Head, "expanding")])
        cells += [
            CellSpec("joint", seed, head, passes=passes)
            for head, seed, passes in product(heads, params.seeds, (1, params.split.tasks))
        ]
    return cells


def frozen_masks(orders: Masks, pct: float) -> dict[str, Tensor]:
    """Return the masks of the first share of every layer's order."""
    return {name: frozen_mask(order, pct) for name, order in orders.items()}


def new_network(params: Params, seed: int) -> TaskNetwork:
    """Build the untrained network of a seed."""
    model = params.model
    return build_network(
        model.arch,
        width=model.width,
        batch_norm=model.batch_norm,
        classes_per_task=params.split.classes_per_task,
        tasks=params.split.tasks,
        seed=seed,
    )


def training_config(params: Params) -> TrainingConfig:
    """Return how every task is trained."""
    return TrainingConfig(**params.train.model_dump())


def explain_config(params: Params) -> ExplainConfig:
    """Return how networks are explained and filters ranked."""
    return ExplainConfig(
        reading=params.saliency.reading,
        **params.visualize.model_dump(),
        aggregate=params.rank.aggregate,
        reverse=params.rank.reverse,
    )


def train_first_task(
    store: CellStore,
    params: Params,
    seed: int,
    tasks: TaskSequence,
    tasks_digest: str,
    device: torch.device,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Train the first task of a seed, or find it stored; return its record."""
    request = CellRequest(
        kind="first_task",
        name=f"first task seed {seed}",
        identity=_common_identity(params, seed, tasks_digest, device),
        params={"seed": seed} | _shown_params(params) | machine(device),
    )

    def train(
        progress: Progress | None, after_epoch: OnEpoch
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        # The first task is answered by the first head under every head mode.
        learner = Learner(
            tasks, training_config(params), head="shared", seed=seed, device=device, curve_tasks=1
        )
        network = new_network(params, seed).to(device)
        progress = progress or Progress(0, [learner.measure(network, 0)])
        learner.learn_task(network, Finetune("shared"), progress, after_epoch)
        before, after = (_known(row)[0] for row in progress.rows)
        row = {"acc_task1_init": before.overall, "acc_task1": after.overall}
        results = {"row": row, "classes": asdict(after), "history": progress.history}
        return results, network.state_dict()

    return store.obtain(request, train, on_epoch)


def train_cell(
    store: CellStore,
    params: Params,
    spec: CellSpec,
    inputs: CellInputs,
    masks: Masks | None,
    device: torch.device,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Train a cell, or find it stored; return its record.

    Parameters
    ----------
    store : CellStore
        Where cells lie.
    params : Params
        All parameters.
    spec : CellSpec
        Which cell.
    inputs : CellInputs
        Of the cell's seed.
    masks : mapping of str to Tensor of bool, or None
        The filters to freeze before the second task; ``freeze`` only.
    device : torch.device
        Where to train.
    on_epoch : callable, optional
        Told the progress after each epoch.
    """
    request = _cell_request(params, spec, inputs, masks, device)
    strategy = _strategy(params, spec, inputs.tasks, masks, device)

    def train(
        progress: Progress | None, after_epoch: OnEpoch
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        learner = Learner(
            inputs.tasks, training_config(params), head=spec.head, seed=spec.seed, device=device
        )
        network = new_network(params, spec.seed).to(device)
        rows: list[list[Accuracy | None] | None] = [] if progress else [learner.measure(network, 0)]
        if isinstance(strategy, Joint):
            progress = progress or Progress(0, rows)
            learner.learn_jointly(network, strategy, progress, after_epoch)
        else:
            network.load_state_dict(inputs.first)
            progress = progress or Progress(1, [*rows, learner.measure(network, 1)])
            while progress.learned < len(inputs.tasks.tasks):
                learner.learn_task(network, strategy, progress, after_epoch)
        results = _results(request.key, params, spec, progress)
        # With more tasks the frozen filters change between them.
        if not isinstance(strategy, Joint) and len(inputs.tasks.tasks) == 2:
            drift = _drift(params, spec, inputs, masks, network, device)
            results["drift"] = drift["layers"]
            results["row"] |= drift["means"]
        return results, network.state_dict()

    return store.obtain(request, train, on_epoch)


def _common_identity(
    params: Params, seed: int, tasks_digest: str, device: torch.device
) -> dict[str, Any]:
    return {
        "seed": seed,
        "tasks": tasks_digest,
        "model": params.model.model_dump(exclude={"head"}),
        "train": params.train.model_dump(),
        "machine": machine(device),
    }


def _cell_request(
    params: Params,
    spec: CellSpec,
    inputs: CellInputs,
    masks: Masks | None,
    device: torch.device,
) -> CellRequest:
    identity = _common_identity(params, spec.seed, inputs.tasks_digest, device) | asdict(spec)
    if spec.strategy != "joint":
        identity["first"] = inputs.first_digest
    if spec.metric is not None and masks is not None:
        identity |= {
            "masks": _digest(masks),
            "batch_norm": params.freeze.batch_norm,
            "aggregate": params.rank.aggregate,
            "saliency": params.saliency.model_dump(),
        }
        if len(inputs.tasks.tasks) > 2:  # ranked anew, by all that ranking depends on
            identity["explain"] = asdict(explain_config(params))
            identity["criterion"] = _own_source(spec.metric)
    shown = {name: value for name, value in asdict(spec).items() if value is not None}
    return CellRequest(
        kind="cell",
        name=spec.name,
        identity=identity,
        params=shown | _shown_params(params) | machine(device),
    )


def _shown_params(params: Params) -> dict[str, Any]:
    """Return the parameters that MLflow shows of every training."""
    sections = {
        "": {"dataset": params.split.dataset},
        "split.": params.split.model_dump(exclude={"dataset", "root"}),
        "model.": params.model.model_dump(exclude={"head"}),
        "train.": params.train.model_dump(),
        "saliency.": params.saliency.model_dump(),
        "visualize.": params.visualize.model_dump(),
        "rank.": params.rank.model_dump(exclude={"metrics"}),
        "freeze.": params.freeze.model_dump(include={"batch_norm"}),
    }
    return {
        f"{prefix}{name}": value
        for prefix, section in sections.items()
        for name, value in section.items()
    }


def _own_source(criterion: str) -> str | None:
    """Return the source of a user's own metric, which the code's digest does not cover."""
    if ":" not in criterion:
        return None
    module = inspect.getmodule(get_metric(criterion))
    assert module is not None
    return inspect.getsource(module)


def _digest(masks: Masks) -> str:
    frozen = {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
    return hashlib.sha256(json.dumps(frozen, sort_keys=True).encode()).hexdigest()


def _strategy(
    params: Params,
    spec: CellSpec,
    tasks: TaskSequence,
    masks: Masks | None,
    device: torch.device,
) -> Strategy:
    if spec.strategy == "joint":
        assert spec.passes is not None
        return Joint(spec.head, spec.passes)
    if spec.strategy == "linear_probe":
        return LinearProbe(spec.head)
    if spec.strategy == "finetune":
        return Finetune(spec.head)
    assert masks is not None
    assert spec.metric is not None
    assert spec.pct is not None
    metric, pct, first_masks = spec.metric, spec.pct, masks

    def choose(network: TaskNetwork, learned: int) -> Masks:
        if learned == 1:
            return first_masks
        task = learned - 1
        batches = Batches(tasks.tasks[task].train, tasks.normalization, device)
        offset = network.label_offset(spec.head, task)
        classes = network.classes_per_task
        view = network.view(spec.head, task, learned)
        if offset:  # explain the task's own logits of the expanding head
            view = torch.nn.Sequential(view, _Columns(offset, classes))
        orders = rank_network(
            view, batches, classes, tasks.normalization, metric, explain_config(params), spec.seed
        )
        prefix = "0." if offset else ""
        return frozen_masks(
            {name.removeprefix(prefix): order for name, order in orders.items()}, pct
        )

    return Freeze(spec.head, choose, params.freeze.batch_norm)


class _Columns(torch.nn.Module):
    """Some neighbouring logits of a classifier."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.range = slice(first, first + count)

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, self.range]


def _known(row: list[Accuracy | None] | None) -> list[Accuracy]:
    assert row is not None
    return [cast(Accuracy, entry) for entry in row]


def _results(key: str, params: Params, spec: CellSpec, progress: Progress) -> dict[str, Any]:
    """Return a cell's row of the sweep, its matrix by class, and its curves."""
    count = params.split.tasks
    rows = [row or [None] * count for row in progress.rows]
    matrix = [[None if entry is None else entry.overall for entry in row] for row in rows]
    by_class = [[None if entry is None else entry.per_class for entry in row] for row in rows]
    last = [value for entry in by_class[-1] if entry for value in entry]
    ranked = spec.metric is not None
    row: dict[str, Any] = {
        "key": key,
        "strategy": spec.strategy,
        "metric": spec.metric,
        "pct": spec.pct,
        "seed": spec.seed,
        "head": spec.head,
        "saliency": params.saliency.method if ranked else None,
        "aggregate": params.rank.aggregate if ranked else None,
        "hyper": {} if spec.passes is None else {"passes": spec.passes},
        "R": matrix,
        "status": "done",
        "acc_mean": average_accuracy(matrix),
        "acc_classes": sum(last) / len(last),
        "forgetting": forgetting(matrix),
        "bwt": backward_transfer(matrix),
        "fwt": forward_transfer(matrix),
    }
    for task in range(count):
        row[f"acc_task{task + 1}"] = matrix[-1][task]
        row[f"acc_task{task + 1}_before"] = matrix[1][task]
        row[f"acc_task{task + 1}_init"] = matrix[0][task]
    return {"row": row, "R_classes": by_class, "history": progress.history}


def _drift(
    params: Params,
    spec: CellSpec,
    inputs: CellInputs,
    masks: Masks | None,
    network: TaskNetwork,
    device: torch.device,
) -> dict[str, Any]:
    """Measure how far filters' responses to the first task's test images have moved."""
    before = new_network(params, spec.seed).to(device)
    before.load_state_dict(inputs.first)
    layers = {name: layer.out_channels for name, layer in conv_layers(before).items()}
    tests = Batches(inputs.tasks.tasks[0].test, inputs.tasks.normalization, device)
    tasks = len(inputs.tasks.tasks)
    drift = response_drift(
        before.view("shared", 0, 1), network.view("shared", 0, tasks), tests, list(layers)
    )
    everything = spec.strategy == "linear_probe"
    frozen = masks or {name: torch.full((filters,), everything) for name, filters in layers.items()}
    means = mean_drift(drift, frozen)
    return {
        "layers": {name: mean_drift({name: drift[name]}, frozen) for name in layers},
        "means": {f"drift_{part}": value for part, value in means.items()},
    }
