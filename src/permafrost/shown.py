"""Which parameters MLflow shows of a training."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from permafrost.params import Params
from permafrost.runs.spec import RunSpec

# Characters of a parameter, at most, that MLflow is given.
_SHOWN = 1000


def shown_params(params: Params, spec: RunSpec) -> dict[str, Any]:
    """Return the parameters that MLflow shows of a run, besides the machine's."""
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
    split = params.split
    unread = {"classes"} if split.named is None else {"classes_per_task", "tasks", "selection"}
    if not isinstance(split.tasks, int):
        unread = {"classes_per_task", "classes", "selection"}
    tasks: dict[str, Any] = {}
    if isinstance(split.tasks, int):
        tasks = {} if "tasks" in unread else {"tasks": split.tasks}
    else:  # not where they lie
        about = [
            task.model_dump(exclude={"root", "classes"}, exclude_none=True)
            | {"classes": task.classes}  # last, since long lists are cut
            for task in split.tasks
        ]
        tasks = {"tasks": str(about)[:_SHOWN]}
    return _dotted(
        {
            "": {"dataset": split.datasets},
            "split.": split.model_dump(exclude={"dataset", "root", "tasks"} | unread) | tasks,
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
