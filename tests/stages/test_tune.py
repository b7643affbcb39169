"""Stage tune: every method gets its trials, and test images choose nothing."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from permafrost.artifacts import load_record
from permafrost.data import LabeledImages, Task
from permafrost.stages import (
    consolidate,
    rank,
    report,
    run_pool,
    saliency,
    split,
    train_first,
    tune,
    visualize,
)
from permafrost.strategies import STRATEGIES
from permafrost.tensors import load_tasks, save_tasks
from project import REPOSITORY

TASKS = Path("data/tasks/0.safetensors")
GRID = {
    "freeze": [{"pct": 0.25}, {"pct": 0.75}],
    "ewc": [{"strength": 1.0}, {"strength": 30.0}],
    "lwf": [{"weight": 1.0, "temperature": 2.0}, {"weight": 5.0, "temperature": 2.0}],
}


@pytest.fixture(scope="module", autouse=True)
def _project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Go through the stages before tune in an empty folder."""
    folder, before = tmp_path_factory.mktemp("tune"), Path.cwd()
    (folder / ".dvc").mkdir()
    os.chdir(folder)
    yaml = YAML()
    params: dict[str, Any] = yaml.load(REPOSITORY / "profiles" / "demo.yaml")
    params["seeds"] = [0]
    params["model"] |= {"arch": "vgg11", "width": 0.05}
    params["train"]["epochs"] = 2
    params["visualize"]["steps"] = 1
    params["rank"]["metrics"] = ["mse"]
    params["tune"] |= GRID
    params["sweep"] |= {"strategies": ["finetune", "freeze", "ewc", "lwf"], "metrics": ["mse"]}
    params["sweep"]["workers"] = 1  # in this process, which may have read another custom/
    params["runtime"]["threads"] = 1
    yaml.dump(params, folder / "params.yaml")
    for stage in (split, train_first, saliency, visualize, rank, consolidate):
        stage.run(0)
    yield
    os.chdir(before)


def choices() -> dict[str, Any]:
    run_pool._inputs.cache_clear()  # as in a process of its own
    tune.run()
    methods = load_record(Path("metrics/tune.json"))["heads"]["shared"]
    for choice in methods.values():  # keys depend on the file of images, whatever part of it
        for trial in choice["trials"]:
            del trial["key"]
    return methods


def relabel(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the labels of one part of the images of every task."""

    def changed(task: Task) -> Task:
        images: LabeledImages = getattr(task, part)
        return replace(task, **{part: replace(images, labels=change(images.labels))})

    sequence = load_tasks(TASKS)
    tasks = tuple(changed(task) for task in sequence.tasks)
    save_tasks(TASKS, replace(sequence, tasks=tasks))


def test_every_method_gets_its_trials_and_the_best_is_chosen() -> None:
    methods = choices()
    assert {name: [t["hyper"] for t in m["trials"]] for name, m in methods.items()} == GRID
    for method in methods.values():
        best = max(trial["acc_mean"] for trial in method["trials"])
        first = next(t for t in method["trials"] if t["acc_mean"] == best)
        assert method["chosen"] == first["hyper"]


def test_test_images_choose_nothing() -> None:
    before = choices()
    relabel("test", lambda labels: labels[torch.randperm(len(labels))])
    assert choices() == before
    # The validation images do: else the test above could not fail.
    relabel("validation", lambda labels: (labels + 1) % 5)
    assert choices() != before


GRID_OF_TWO = [
    {"weight": weight, "temperature": temperature}
    for weight, temperature in ((1.0, 2.0), (3.0, 2.0), (10.0, 2.0), (3.0, 5.0))
]


@pytest.mark.parametrize(
    ("name", "grid", "edges"),
    [
        ("ewc", [{"strength": value} for value in (30.0, 10.0, 100.0)], {10.0, 100.0}),
        ("ewc", [{"strength": value} for value in (10.0, 0.0)], {10.0}),  # there is none below 0
        ("freeze", [{"pct": value} for value in (0.25, 0.5, 1.0)], {0.25}),
        ("ewc", [{"strength": 10.0}, {"strength": 10.0}], set()),
    ],
)
def test_an_edge_is_an_end_of_the_grid_beyond_which_values_are_allowed(
    name: str, grid: list[dict[str, float]], edges: set[float]
) -> None:
    bounds = STRATEGIES[name].hyper
    for entry in grid:
        ((key, value),) = entry.items()
        assert tune._edges(entry, grid, bounds) == ([key] if value in edges else [])


def test_each_hyperparameter_has_its_own_edges() -> None:
    found = [tune._edges(entry, GRID_OF_TWO, STRATEGIES["lwf"].hyper) for entry in GRID_OF_TWO]
    assert found == [
        ["weight", "temperature"],
        ["temperature"],
        ["weight", "temperature"],
        ["temperature"],
    ]


def test_what_is_chosen_at_the_edge_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Two entries have no inner one, and of the temperature one value was tried."""
    methods = choices()
    printed, table = capsys.readouterr().out, "\n".join(report._choices(methods))
    for name, key in (("freeze", "pct"), ("ewc", "strength"), ("lwf", "weight")):
        assert methods[name]["at_edge"] == [key]
        value = methods[name]["chosen"][key]
        assert f"warning: shared, {name}: {key} {value:g} is at the edge of its grid" in printed
        assert f"{key} {value:g} (at the edge of its grid)" in table
    assert printed.count("edge") == table.count("edge") == 3
    fixed = {"chosen": {"pct": 0.5}, "trials": [], "at_edge": []}
    assert "edge" not in "\n".join(report._choices({"freeze": fixed}))
