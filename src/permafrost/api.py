"""Learn a sequence of tasks from Python: without a project, DVC, MLflow or ``params.yaml``.

It calls what the stages call; what they store, key and log is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permafrost.artifacts import load_record
from permafrost.data import TaskSequence
from permafrost.errors import InputError
from permafrost.freezing import BatchNormFreeze
from permafrost.hyper import Value, is_allowed, span
from permafrost.imports import require_workflow
from permafrost.models import Head, TaskNetwork
from permafrost.ranking import CRITERIA
from permafrost.ranking.method import ExplainConfig
from permafrost.registry import find_custom
from permafrost.runs.first_task import learn_first
from permafrost.runs.further_tasks import learn_further
from permafrost.runs.knowledge import first_lesson
from permafrost.runs.network import new_network
from permafrost.runs.outcome import Outcome
from permafrost.runs.rows import further_row
from permafrost.runs.spec import Settings
from permafrost.strategies import STRATEGIES, Keep, Memory, Strategy
from permafrost.strategies.ranked import RankedMasks
from permafrost.tensors import save_tensors
from permafrost.training import TrainingConfig, TrainingDiverged, resolve_precision

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Learned:
    """What :func:`learn` ends with.

    Attributes
    ----------
    accuracy : list of list of float or None
        R, T + 1 rows of T: ``accuracy[t][k]`` is the test accuracy on task k + 1 after learning t
        tasks, 0..1; None where there is none.
    measures : dict
        What follows from it, as in the sweep's rows: ``acc_mean``, ``forgetting``, ``bwt``,
        ``fwt``, ``acc_task1`` and so on, ``drift_frozen``, ``free_filters``, ``memory_bytes``.
    network : TaskNetwork
        The trained network on the CPU, in eval mode; ``network.view(head, task, learned)`` is the
        classifier of a task, counted from 0. Of PackNet it answers rightly for the last task alone.
    """

    accuracy: list[list[float | None]]
    measures: dict[str, Any]
    network: TaskNetwork
    _about: dict[str, Any] = field(repr=False)

    def frame(self) -> "DataFrame":
        """Return R as a table of pandas, a row for each number of tasks learned."""
        require_workflow("pandas")
        from pandas import DataFrame

        names = [f"task {task + 1}" for task in range(len(self.accuracy[0]))]
        found = DataFrame(self.accuracy, columns=names, dtype=float)
        return found.rename_axis(index="tasks learned")

    def save(self, path: str | Path) -> None:
        """Write the network's weights, for :func:`permafrost.load_network`."""
        save_tensors(Path(path), self.network.state_dict(), self._about)


def learn(
    tasks: TaskSequence,
    *,
    network: str,
    strategy: str = "finetune",
    hyper: Mapping[str, Value] | None = None,
    criterion: str | None = None,
    pct: float = 0.5,
    freeze_batch_norm: BatchNormFreeze = "full",
    head: Head = "shared",
    width: float = 1.0,
    batch_norm: bool = True,
    weights: Mapping[str, Tensor] | None = None,
    training: TrainingConfig = TrainingConfig(),  # noqa: B008  (frozen)
    explain: ExplainConfig = ExplainConfig(),  # noqa: B008
    keep: Keep = Keep(),  # noqa: B008
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Learned:
    """Learn tasks one after the other by a strategy, and measure the network on all of them.

    On a CPU, with as many threads, the same bits as a workflow's run of the same settings.

    Parameters
    ----------
    tasks : TaskSequence
        Of :func:`tasks_from_dataset` or :func:`tasks_from_tensors`.
    network : str
        A name in ``NETWORKS``, ``torchvision:NAME``, or a user's own, ``module:function``, which is
        installed or lies in ``custom`` of the current folder.
    strategy : str
        A name in ``STRATEGIES``, or ``module:Class``.
    hyper : mapping of str to float or str, optional
        Its hyperparameters, where they are not the defaults.
    criterion : str, optional
        What ranks the filters: a name in ``CRITERIA``, or ``module:function``. Needed by strategies
        that freeze ranked filters, and by no other.
    pct : float
        The share of every layer's free filters that these freeze, 0..1.
    freeze_batch_norm : {"full", "affine", "none"}
        What they freeze of a frozen filter's BatchNorm.
    head : {"shared", "multi", "expanding"}
        How the network answers.
    width : float
        Factor on the numbers of filters, > 0.
    batch_norm : bool
        Whether the network has BatchNorms.
    weights : mapping of str to Tensor, optional
        That its body begins with, as :func:`permafrost.models.read_weights` returns them.
    training : TrainingConfig
        How each task is trained.
    explain : ExplainConfig
        How the network is explained, for criteria that look at maps.
    keep : Keep
        How much the strategy may keep of each task.
    seed : int
        Of all random draws, not negative.
    device : str or torch.device
        Where to train.

    Raises
    ------
    InputError
        One line that names the argument, what was wrong and what is allowed.
    TrainingDiverged
        If a training diverges.
    """
    find_custom(Path.cwd())
    device = torch.device(device)
    precision = resolve_precision(training.precision, device)
    train = replace(training, precision=precision)
    settings = Settings(network, width, batch_norm, weights, train, keep)
    made = STRATEGIES.find(strategy)
    _check(strategy, made, criterion, pct, head)
    chosen = _hyperparameters(strategy, made, hyper or {})
    masks = RankedMasks(criterion or "", pct, explain)
    learner = made.build(head, chosen, masks, freeze_batch_norm)

    first = learn_first(settings, seed, tasks, device, None, _ignore)
    memory = _memory(settings, made, seed, tasks, first, device)
    outcome = learn_further(
        settings, learner, seed, tasks, first.weights, memory, device, None, _ignore
    )
    row = further_row(outcome.facts)
    if row.pop("status") == "failed":
        raise TrainingDiverged(f"{row['error']}; set a lower learning rate")
    trained = new_network(settings, tasks, seed)
    trained.load_state_dict(outcome.weights)
    return Learned(row.pop("R"), row, trained.eval(), outcome.about)


def read_runs(project: str | Path = ".") -> "DataFrame":
    """Return a project's comparison as a table of pandas: a row for each run.

    Parameters
    ----------
    project : str or Path
        Its folder, in which ``dvc repro`` has run.

    Returns
    -------
    DataFrame
        The columns of ``metrics/sweep.json``; each hyperparameter has one of its own,
        ``hyper.NAME``.

    Raises
    ------
    InputError
        If there is no comparison, or it is damaged.
    """
    require_workflow("pandas")
    from pandas import DataFrame

    rows = load_record(Path(project) / "metrics" / "sweep.json")
    flat = [
        {name: value for name, value in row.items() if name != "hyper"}
        | {f"hyper.{name}": value for name, value in row["hyper"].items()}
        for row in rows
    ]
    return DataFrame(flat)


def _ignore(progress: object) -> None:
    """Take note of no epoch: nothing is stored."""


def _check(name: str, made: type[Strategy], criterion: str | None, pct: float, head: Head) -> None:
    if head not in made.heads:
        raise InputError(f"head: {name} cannot answer under {head!r}; allowed: {made.heads}")
    is_ranked = made.freezes_ranked or made.ranks
    if is_ranked != (criterion is not None):
        wanted = "wanted: what ranks its filters" if is_ranked else "allowed: None"
        raise InputError(f"criterion: is {criterion!r} with strategy {name!r}; {wanted}")
    if criterion is not None:
        CRITERIA.find(criterion)
    if not 0 <= pct <= 1:
        raise InputError(f"pct: is {pct}; allowed: 0..1")


def _hyperparameters(
    name: str, made: type[Strategy], hyper: Mapping[str, Value]
) -> dict[str, Value]:
    """Return a strategy's hyperparameters but for its share, which the masks have."""
    defaults = {key: value for key, value in made.defaults().items() if key != "pct"}
    for key, value in hyper.items():
        if key not in defaults:
            allowed = ", ".join(defaults) or "none"
            raise InputError(f"hyper: strategy {name!r} has no {key!r}; allowed: {allowed}")
        if not is_allowed(value, made.hyper[key]):
            raise InputError(f"hyper: {key} is {value}; allowed: {span(made.hyper[key])}")
    return defaults | dict(hyper)


def _memory(
    settings: Settings,
    made: type[Strategy],
    seed: int,
    tasks: TaskSequence,
    first: Outcome,
    device: torch.device,
) -> Memory:
    """Return what a strategy keeps of the first task."""
    if made.knowledge is None:
        return {}
    network = new_network(settings, tasks, seed)
    network.load_state_dict(first.weights)
    lesson = first_lesson(settings, seed, tasks, network.to(device), first.kept, device)
    # On the CPU and dense, as they come from the file that the workflow keeps them in.
    return {
        name: value.detach().cpu().contiguous() for name, value in made.knowledge(lesson).items()
    }
