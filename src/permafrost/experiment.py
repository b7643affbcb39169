"""How each training that the parameters ask for is done.

The bridge from params.yaml to the library: it turns a cell's description into a request that
:mod:`permafrost.cells` can key, store and resume.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from permafrost.cells import CellRequest, CellStore, Outcome
from permafrost.data import Batches, TaskSequence
from permafrost.errors import NotFiniteError
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
from permafrost.machine import machine_identity
from permafrost.models import TaskNetwork, build_network
from permafrost.params import Params
from permafrost.plan import CellSpec
from permafrost.ranking import frozen_mask, own_code
from permafrost.strategies import (
    INTEGRAL,
    RETRAIN,
    STRATEGIES,
    Finetune,
    Freeze,
    FreezeWith,
    Guard,
    Joint,
    Keep,
    Learner,
    Lesson,
    Memory,
    PathIntegral,
    Phase,
    Progress,
    Strategy,
    common_parameters,
)
from permafrost.strategies.reranking import ExplainConfig, rank_network
from permafrost.training import TrainingConfig, part_of, resolve_precision

OnEpoch = Callable[[Progress], None]


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
    read_knowledge : callable
        Returns what stage consolidate wrote; only some methods need it.
    kind : {"cell", "trial"}
        ``trial``: the tasks' test images are replaced by their validation images.
    """

    tasks: TaskSequence
    tasks_digest: str
    first: dict[str, Tensor]
    first_digest: str
    read_knowledge: Callable[[], Memory]
    kind: str = "cell"

    def on_validation(self) -> "CellInputs":
        """Return the inputs with validation images in the place of the test images."""
        tasks = tuple(replace(task, test=task.validation) for task in self.tasks.tasks)
        return replace(self, tasks=replace(self.tasks, tasks=tasks), kind="trial")


Masks = Mapping[str, Tensor]


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


def training_config(params: Params, device: torch.device) -> TrainingConfig:
    """Return how every task is trained on a device."""
    precision = resolve_precision(params.train.precision, device)
    return TrainingConfig(**params.train.model_dump() | {"precision": precision})


def machine_of(params: Params, device: torch.device) -> dict[str, Any]:
    """Return what of the machine enters the key of a training, and is shown of it."""
    return machine_identity(device, resolve_precision(params.train.precision, device))


def keep_config(params: Params) -> Keep:
    """Return how much methods keep of each task."""
    return Keep(**params.consolidate.model_dump())


def explain_config(params: Params) -> ExplainConfig:
    """Return how networks are explained and filters ranked."""
    return ExplainConfig(
        method=params.saliency.method,
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
    """Train the first task of a seed, or find it stored; return its record.

    Raises
    ------
    TrainingDiverged
        If the training diverges; nothing is stored of it.
    """
    request = CellRequest(
        kind="first_task",
        name=f"first task seed {seed}",
        identity=_common_identity(params, seed, tasks_digest, device),
        params={"seed": seed} | shown_training(params) | machine_of(params, device),
    )

    def train(progress: Progress | None, after_epoch: OnEpoch) -> Outcome:
        # The first task is answered by the first head under every head mode.
        learner = Learner(
            tasks,
            training_config(params, device),
            head="shared",
            seed=seed,
            device=device,
            curve_tasks=1,
        )
        network = new_network(params, seed).to(device)
        progress = progress or Progress(0, [learner.measure(network, 0)])
        watched = common_parameters(network, "shared", learned=1)
        recorder = _FirstTask("shared", PathIntegral(watched))
        learner.learn_task(network, recorder, progress, after_epoch)
        before, after = (_known(row)[0] for row in progress.rows)
        row = {"acc_task1_init": before.overall, "acc_task1": after.overall}
        results = {"row": row, "classes": asdict(after), "history": progress.history}
        integral = recorder.integral.tensors
        return Outcome(results, network.state_dict(), progress.seconds, integral)

    return store.obtain(request, train, on_epoch)


@dataclass(frozen=True)
class _FirstTask(Finetune):
    """Plain training that records the path integral, which SI needs of the first task."""

    integral: PathIntegral

    def while_learning(self, lesson: Lesson, phase: Phase) -> AbstractContextManager[Guard]:
        del lesson, phase
        return nullcontext(Guard(observer=self.integral))


def first_lesson(
    params: Params,
    seed: int,
    tasks: TaskSequence,
    network: TaskNetwork,
    integral: Memory,
    device: torch.device,
) -> Lesson:
    """Return the lesson that the first task was, to make what methods need of it.

    Parameters
    ----------
    params : Params
        All parameters.
    seed : int
        Of the training.
    tasks : TaskSequence
        The images.
    network : TaskNetwork
        After the first task.
    integral : dict of str to Tensor
        The path integral that its training recorded.
    device : torch.device
        Where to compute.
    """
    return Lesson(
        network=network,
        learned=0,
        sequence=tasks,
        config=training_config(params, device),
        head="shared",  # under every head mode the first head answers
        seed=seed,
        device=device,
        keep=keep_config(params),
        memory={f"{INTEGRAL}{name}": value.to(device) for name, value in integral.items()},
        start=new_network(params, seed).state_dict(),
    )


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

    A training that diverges is a record too: the row's ``status`` is ``failed`` and its ``error``
    says where; it has no accuracies.

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
        The filters to freeze before the second task; strategies that freeze filters only.
    device : torch.device
        Where to train.
    on_epoch : callable, optional
        Told the progress after each epoch.
    """
    strategy = _strategy(params, spec, inputs.tasks, masks, device)
    memory, knowledge_digest = _memory(strategy, inputs)
    request = _cell_request(params, spec, inputs, masks, knowledge_digest, device)

    def train(progress: Progress | None, after_epoch: OnEpoch) -> Outcome:
        learner = Learner(
            inputs.tasks,
            training_config(params, device),
            head=spec.head,
            seed=spec.seed,
            device=device,
            keep=keep_config(params),
        )
        network = new_network(params, spec.seed).to(device)
        progress = progress or Progress(0, [learner.measure(network, 0)])
        try:
            _learn(learner, network, strategy, progress, inputs.first, memory, after_epoch)
            results = _results(request.key, params, spec, progress)
            results["row"]["memory_bytes"] = _memory_bytes(strategy, inputs.tasks, progress, masks)
            # With more tasks the frozen filters change between them.
            if not isinstance(strategy, Joint) and len(inputs.tasks.tasks) == 2:
                final = strategy.network_for(network, 0, progress.memory)
                layers = {n: m for n, m in progress.memory.items() if m.dtype == torch.bool}
                drift = _drift(params, spec, inputs, masks or layers, final, device)
                results["drift"] = drift["layers"]
                results["row"] |= drift["means"]
        except NotFiniteError as error:
            row = _row_head(request.key, params, spec) | {"status": "failed", "error": str(error)}
            results = {"row": row, "history": progress.history + progress.training.history}
        seconds = progress.seconds + progress.training.seconds
        return Outcome(results, network.state_dict(), seconds)

    return store.obtain(request, train, on_epoch)


def _learn(
    learner: Learner,
    network: TaskNetwork,
    strategy: Strategy,
    progress: Progress,
    first: Memory,
    memory: Memory,
    after_epoch: OnEpoch,
) -> None:
    """Learn what is left to learn, from the first task's weights and what is kept of it."""
    if isinstance(strategy, Joint):
        learner.learn_jointly(network, strategy, progress, after_epoch)
        return
    network.load_state_dict(first)
    if progress.learned == 0:
        progress.rows.append(learner.measure(network, 1))
        progress.learned, progress.memory = 1, memory
    while progress.learned < len(learner.sequence.tasks):
        learner.learn_task(network, strategy, progress, after_epoch)


def _memory(strategy: Strategy, inputs: CellInputs) -> tuple[Memory, str | None]:
    """Return what a strategy keeps of the first task, and its hash."""
    if strategy.knowledge is None:
        return {}, None
    memory = part_of(inputs.read_knowledge(), f"{strategy.knowledge}/")
    digest = hashlib.sha256()
    for name, tensor in sorted(memory.items()):
        digest.update(f"{name}\0".encode() + tensor.contiguous().numpy().tobytes())
    return memory, digest.hexdigest()


def _memory_bytes(
    strategy: Strategy, tasks: TaskSequence, progress: Progress, masks: Masks | None
) -> int:
    """Return how much a strategy keeps besides the network while it learns the last task."""
    if isinstance(strategy, Joint):
        return sum(task.train.images.nbytes for task in tasks.tasks[:-1])
    return sum(tensor.nbytes for tensor in [*progress.memory.values(), *(masks or {}).values()])


def _common_identity(
    params: Params, seed: int, tasks_digest: str, device: torch.device
) -> dict[str, Any]:
    return {
        "seed": seed,
        "tasks": tasks_digest,
        "model": params.model.model_dump(exclude={"head"}),
        "train": params.train.model_dump(exclude={"precision"}),  # as resolved, in machine
        "machine": machine_of(params, device),
    }


def _cell_request(
    params: Params,
    spec: CellSpec,
    inputs: CellInputs,
    masks: Masks | None,
    knowledge_digest: str | None,
    device: torch.device,
) -> CellRequest:
    identity = _common_identity(params, spec.seed, inputs.tasks_digest, device) | asdict(spec)
    if knowledge_digest is not None:
        identity |= {"knowledge": knowledge_digest, "keep": asdict(keep_config(params))}
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
            identity["criterion"] = own_code(spec.metric)
    return CellRequest(
        kind=inputs.kind,
        name=spec.name,
        identity=identity,
        params=shown_params(params, spec) | machine_of(params, device),
    )


def shown_params(params: Params, spec: CellSpec) -> dict[str, Any]:
    """Return the parameters that MLflow shows of a cell, besides the machine's."""
    shown = asdict(spec) | spec.hyperparameters
    shown = {name: value for name, value in shown.items() if value is not None and name != "hyper"}
    ranking = {
        "saliency.": params.saliency.model_dump(),
        "visualize.": params.visualize.model_dump(),
        "rank.": params.rank.model_dump(exclude={"metrics"}),
        "freeze.": params.freeze.model_dump(include={"batch_norm"}),
    }
    return shown | shown_training(params) | _dotted(ranking)


def shown_training(params: Params) -> dict[str, Any]:
    """Return the parameters that MLflow shows of every training."""
    return _dotted(
        {
            "": {"dataset": params.split.dataset},
            "split.": params.split.model_dump(exclude={"dataset", "root"}),
            "model.": params.model.model_dump(exclude={"head"}),
            "train.": params.train.model_dump(exclude={"precision"}),
        }
    )


def _dotted(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{prefix}{name}": value
        for prefix, section in sections.items()
        for name, value in section.items()
    }


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
    make, hyper = STRATEGIES[spec.strategy], spec.hyperparameters
    if spec.metric is None or spec.pct is None:
        return make(spec.head, **hyper)
    assert masks is not None
    metric, pct, first_masks = spec.metric, spec.pct, masks

    def choose(network: TaskNetwork, learned: int) -> Masks:
        if learned == 1:
            return first_masks
        task = learned - 1
        batches = Batches(tasks.tasks[task].train, tasks.normalization, device)
        # The task's own logits, which an expanding head has among others.
        own = "multi" if spec.head == "expanding" else spec.head
        orders = rank_network(
            network.view(own, task, learned),
            batches,
            network.classes_per_task,
            tasks.normalization,
            metric,
            explain_config(params),
            spec.seed,
        )
        return frozen_masks(orders, pct)

    freeze = Freeze(spec.head, choose, params.freeze.batch_norm)
    if issubclass(make, FreezeWith):
        return make(spec.head, freeze, make.companion(spec.head, **hyper))
    return freeze


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
    row = _row_head(key, params, spec) | {
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
    for epoch in progress.history:
        if epoch["phase"] == RETRAIN:  # R[t][t] is from before pruning; the last epoch counts
            pruned = f"acc_task{epoch['task'] - 1}"
            row[f"{pruned}_pruned"] = epoch[pruned]
    return {"row": row, "R_classes": by_class, "history": progress.history}


def _row_head(key: str, params: Params, spec: CellSpec) -> dict[str, Any]:
    """Return the part of a cell's row that is known before it is trained."""
    ranked = spec.metric is not None
    return {
        "key": key,
        "strategy": spec.strategy,
        "metric": spec.metric,
        "pct": spec.pct,
        "seed": spec.seed,
        "head": spec.head,
        "saliency": params.saliency.method if ranked else None,
        "aggregate": params.rank.aggregate if ranked else None,
        "hyper": spec.hyperparameters,
    }


def _drift(
    params: Params,
    spec: CellSpec,
    inputs: CellInputs,
    masks: Masks,
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
    frozen = {name: torch.full((filters,), everything) for name, filters in layers.items()}
    frozen |= masks
    means = mean_drift(drift, frozen)
    return {
        "layers": {name: mean_drift({name: drift[name]}, frozen) for name in layers},
        "means": {f"drift_{part}": value for part, value in means.items()},
    }
