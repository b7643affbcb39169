"""What each training that the parameters ask for is: its settings, its inputs and its key.

The bridge from params.yaml to :mod:`permafrost.runs`: it turns a run's description into a request
that :mod:`permafrost.runs.store` can key, store and resume.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from permafrost.data import TaskSequence
from permafrost.explain import SALIENCY_METHODS
from permafrost.first_weights import FirstWeights, first_weights, weights_path
from permafrost.machine import machine_identity
from permafrost.models import NETWORKS, TaskNetwork, build_network
from permafrost.params import Params
from permafrost.ranking import CRITERIA, filters_of
from permafrost.ranking.method import ExplainConfig
from permafrost.runs import first_task, further_tasks
from permafrost.runs.outcome import OnEpoch, Outcome
from permafrost.runs.spec import RunSpec, Settings
from permafrost.runs.store import RunRequest, RunStore, Train
from permafrost.shown import shown_params, shown_training
from permafrost.strategies import STRATEGIES, Keep, Memory, Progress, Strategy, ranked
from permafrost.training import TrainingConfig, part_of, resolve_precision


@dataclass(frozen=True)
class RunInputs:
    """What a run of one seed starts from.

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
    weights : FirstWeights
        What the network began with.
    kind : {"cell", "trial"}
        ``trial``: the tasks' test images are replaced by their validation images.
    """

    tasks: TaskSequence
    tasks_digest: str
    first: dict[str, Tensor]
    first_digest: str
    read_knowledge: Callable[[], Memory]
    weights: FirstWeights = field(default_factory=FirstWeights)
    kind: str = "cell"

    def on_validation(self) -> "RunInputs":
        """Return the inputs with validation images in the place of the test images."""
        tasks = tuple(replace(task, test=task.validation) for task in self.tasks.tasks)
        return replace(self, tasks=replace(self.tasks, tasks=tasks), kind="trial")

    def by_content(self, strategy: type[Strategy]) -> "RunInputs":
        """Return the inputs with what a strategy needs of them read, to be sent elsewhere."""
        name = knowledge_name(strategy)
        known = {} if name is None else self.read_knowledge()
        held = {entry: value for entry, value in known.items() if entry.startswith(f"{name}/")}
        return replace(self, read_knowledge=partial(dict, held))


Masks = Mapping[str, Tensor]


def new_network(params: Params, seed: int) -> TaskNetwork:
    """Build the network of a seed, untrained, for weights to be loaded into."""
    model = params.model
    return build_network(
        model.arch,
        classes=params.split.sizes,
        seed=seed,
        image_size=params.split.height_and_width,
        width=model.width,
        batch_norm=model.batch_norm,
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


def run_settings(params: Params, weights: FirstWeights, device: torch.device) -> Settings:
    """Return how every run is done on a device."""
    return Settings(
        **params.model.model_dump(exclude={"head", "weights"}),
        weights=weights.tensors,
        train=training_config(params, device),
        keep=keep_config(params),
    )


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
    store: RunStore,
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
    weights = first_weights(weights_path(params))
    settings = run_settings(params, weights, device)
    request = RunRequest(
        kind="first_task",
        name=f"first task seed {seed}",
        identity=_common_identity(params, seed, tasks_digest, weights.digest, device),
        params={"seed": seed} | shown_training(params) | machine_of(params, device),
        code=(first_task.__name__, NETWORKS.home(params.model.arch)),
    )

    def train(progress: Progress | None, after_epoch: OnEpoch) -> Outcome:
        return first_task.learn_first(settings, seed, tasks, device, progress, after_epoch)

    return store.obtain(request, train, on_epoch)


def knowledge_name(strategy: type[Strategy]) -> str | None:
    """Name what a strategy needs of the first task; those that need the same share it."""
    make = strategy.knowledge
    return None if make is None else f"{make.__module__}.{make.__qualname__}"


def train_run(
    store: RunStore,
    params: Params,
    spec: RunSpec,
    inputs: RunInputs,
    masks: Masks | None,
    device: torch.device,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Train a run, or find it stored; return its record.

    A training that diverges is a record too: the row's ``status`` is ``failed`` and its ``error``
    says where; it has no accuracies.

    Parameters
    ----------
    store : RunStore
        Where runs lie.
    params, spec, inputs, masks, device
        As of :func:`request_run`.
    on_epoch : callable, optional
        Told the progress after each epoch.
    """
    return store.obtain(*request_run(params, spec, inputs, masks, device), on_epoch)


def request_run(
    params: Params, spec: RunSpec, inputs: RunInputs, masks: Masks | None, device: torch.device
) -> tuple[RunRequest, Train]:
    """Return what a run is, and what trains it.

    Parameters
    ----------
    params : Params
        All parameters.
    spec : RunSpec
        Which run.
    inputs : RunInputs
        Of the run's seed.
    masks : mapping of str to Tensor, or None
        Of strategies that freeze a share of ranked filters, those to freeze before the second task
        (bool); of others that rank, the layers' filters in their order (int64).
    device : torch.device
        Where to train.
    """
    strategy = run_strategy(params, spec, masks)
    memory, knowledge_digest = _memory(strategy, inputs)
    request = _run_request(params, spec, inputs, masks, knowledge_digest, device)
    settings = run_settings(params, inputs.weights, device)

    def train(progress: Progress | None, after_epoch: OnEpoch) -> Outcome:
        return further_tasks.learn_further(
            settings,
            strategy,
            spec.seed,
            inputs.tasks,
            inputs.first,
            memory,
            device,
            progress,
            after_epoch,
        )

    return request, train


def run_strategy(params: Params, spec: RunSpec, masks: Masks | None) -> Strategy:
    """Return the strategy that a run learns by."""
    made = STRATEGIES.find(spec.strategy)
    known = {"first_orders" if made.ranks else "first": masks}
    explain = explain_config(params)
    ranking = ranked.RankedMasks(spec.metric or "", spec.pct or 0, explain, **known)
    strategy = made.build(spec.head, spec.hyperparameters, ranking, params.freeze.batch_norm)
    return strategy.as_twin(spec.twin) if spec.twin else strategy


def _memory(strategy: Strategy, inputs: RunInputs) -> tuple[Memory, str | None]:
    """Return what a strategy keeps of the first task, and its hash."""
    name = knowledge_name(type(strategy))
    if name is None:
        return {}, None
    memory = part_of(inputs.read_knowledge(), f"{name}/")
    digest = hashlib.sha256()
    for entry, tensor in sorted(memory.items()):
        digest.update(f"{entry}\0".encode() + tensor.contiguous().numpy().tobytes())
    return memory, digest.hexdigest()


def _common_identity(
    params: Params,
    seed: int,
    tasks_digest: str,
    weights_digest: str | None,
    device: torch.device,
) -> dict[str, Any]:
    return {
        "seed": seed,
        "tasks": tasks_digest,
        "model": params.model.model_dump(exclude={"head"}) | {"weights": weights_digest},
        "train": params.train.model_dump(exclude={"precision"}),  # as resolved, in machine
        "machine": machine_of(params, device),
    }


def _run_request(
    params: Params,
    spec: RunSpec,
    inputs: RunInputs,
    masks: Masks | None,
    knowledge_digest: str | None,
    device: torch.device,
) -> RunRequest:
    digests = inputs.tasks_digest, inputs.weights.digest
    identity = _common_identity(params, spec.seed, *digests, device) | asdict(spec)
    if spec.twin is None:
        del identity["twin"]
    code = [further_tasks.__name__, NETWORKS.home(params.model.arch)]
    code.append(STRATEGIES.home(spec.strategy))
    if knowledge_digest is not None:
        identity |= {"knowledge": knowledge_digest, "keep": asdict(keep_config(params))}
    made = STRATEGIES[spec.strategy]
    if "batch_norm" in made.built_of():
        identity["batch_norm"] = params.freeze.batch_norm
    if made.continues:
        identity["first"] = inputs.first_digest
    if spec.metric is not None and masks is not None:
        is_ordered, anew = made.ranks, len(inputs.tasks.tasks) > 2
        identity["orders" if is_ordered else "masks"] = _digest(masks)
        code += [ranked.__name__] if is_ordered or anew else []
        if anew:  # ranked anew, by all that ranking depends on
            identity["explain"] = asdict(explain_config(params))
            code += [CRITERIA.home(spec.metric), SALIENCY_METHODS.home(params.saliency.method)]
    return RunRequest(
        kind=inputs.kind,
        name=spec.name,
        identity=identity,
        params=shown_params(params, spec) | machine_of(params, device),
        code=tuple(code),
        row=_row_head(params, spec),
    )


def _digest(masks: Masks) -> str:
    frozen = {
        name: filters_of(mask) if mask.dtype == torch.bool else mask.tolist()
        for name, mask in masks.items()
    }
    return hashlib.sha256(json.dumps(frozen, sort_keys=True).encode()).hexdigest()


def _row_head(params: Params, spec: RunSpec) -> dict[str, Any]:
    """Return the part of a run's row that is known before it is trained."""
    is_ranked = spec.metric is not None
    return {
        "strategy": spec.strategy,
        "metric": spec.metric,
        "pct": spec.pct,
        "seed": spec.seed,
        "head": spec.head,
        "saliency": params.saliency.method if is_ranked else None,
        "aggregate": params.rank.aggregate if is_ranked else None,
        "hyper": spec.hyperparameters,
        "twin": spec.twin,
        "remark": STRATEGIES[spec.strategy].remark,
    }
