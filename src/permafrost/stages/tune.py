"""Stage tune: choose each method's hyperparameters on validation images of the first seed."""

from typing import Any

from permafrost.artifacts import load_record, require, save_record
from permafrost.errors import InputError
from permafrost.evaluation import accuracy_name
from permafrost.hyper import Allowed, Value, as_text, is_word
from permafrost.models import Head
from permafrost.params import Params
from permafrost.plan import Chosen, grids, heads, method_run
from permafrost.runs.spec import RunSpec
from permafrost.stages.run_pool import train_runs
from permafrost.stages.shared import TRIALS, TUNE
from permafrost.stages.workspace import Workspace, open_workspace
from permafrost.strategies import STRATEGIES

Choice = dict[str, Any]
Row = dict[str, Any]


def run() -> None:
    """Write what was tried and what was chosen, under each head, and a row for each trial.

    A trial that diverges is never chosen, and else no failure: a grid may reach too far. A grid may
    also end too early: what was chosen at its edge is told, and recorded.

    Raises
    ------
    InputError
        If all trials of a method diverge.
    """
    with open_workspace("tune") as workspace:
        choices: dict[Head, dict[str, Choice]] = {}
        rows: list[Row] = []
        for head in heads(workspace.params):
            choices[head], tried_here = _choose(workspace, head)
            rows += tried_here
        save_record(TUNE, {"seed": workspace.params.seeds[0], "heads": choices})
        # Not in git: where they are missing, as in a clone, DVC has the trials trained.
        save_record(TRIALS, {"trials": rows})
        workspace.tell_unlogged(*rows)
        for head, methods in choices.items():
            for name, choice in methods.items():
                tried = len(choice["trials"])
                chosen = {key: as_text(value) for key, value in choice["chosen"].items()}
                shown = ", ".join(f"{key} {value}" for key, value in chosen.items())
                diverged = sum(trial["acc_mean"] is None for trial in choice["trials"])
                about = f"of {tried}" + (f", {diverged} diverged" if diverged else "")
                print(f"{head}, {name}: {shown} ({about if tried else 'fixed'})")
                for key in choice["at_edge"]:
                    print(
                        f"warning: {head}, {name}: {key} {chosen[key]} is at the edge "
                        f"of its grid; try values beyond it (tune.{name})"
                    )


def read_choices(params: Params) -> Chosen:
    """Read the chosen hyperparameters.

    Raises
    ------
    InputError
        If the file is damaged or of other params.
    """
    written = load_record(TUNE).get("heads", {})
    chosen = {
        head: {name: choice["chosen"] for name, choice in written.get(head, {}).items()}
        for head in params.sweep.heads
    }
    whole = all(name in chosen[head] for head in chosen for name in grids(params))
    require(whole, TUNE, "holds no choice for a method of the sweep")
    return chosen


def _choose(workspace: Workspace, head: Head) -> tuple[dict[str, Choice], list[Row]]:
    """Choose for one method after the other; those that freeze need the chosen share."""
    choices: dict[str, Choice] = {}
    rows: list[Row] = []
    for name, grid in grids(workspace.params).items():
        chosen = {known: choice["chosen"] for known, choice in choices.items()}
        if len(grid) == 1:
            choices[name] = {"chosen": grid[0], "trials": [], "at_edge": []}
            continue
        specs = [_trial(workspace.params, name, head, chosen | {name: hyper}) for hyper in grid]
        records = train_runs(workspace, specs, f"trials of {name}", on_validation=True)
        tried = [records[spec]["row"] for spec in specs]
        rows += tried
        tasks = [accuracy_name(task) for task in range(len(workspace.params.split.sizes))]
        shown = ["key", *tasks, "acc_mean"]
        trials = [
            {"hyper": hyper} | {key: row.get(key) for key in shown}
            for row, hyper in zip(tried, grid, strict=True)
        ]
        done = [trial for trial in trials if trial["acc_mean"] is not None]
        if not done:
            raise InputError(f"tune.{name}: every trial diverged; declare lower values")
        best = max(done, key=lambda trial: trial["acc_mean"])  # the first of equals
        edges = _edges(best["hyper"], grid, STRATEGIES[name].hyper)
        choices[name] = {"chosen": best["hyper"], "trials": trials, "at_edge": edges}
    return choices, rows


def _edges(
    chosen: dict[str, Any],
    grid: list[dict[str, Any]],
    bounds: dict[str, Allowed],
) -> list[str]:
    """Return which hyperparameters were chosen at an end of what was tried.

    Not those of which one value was tried only, nor where no value beyond is allowed; no words.
    """
    edges = []
    for key, value in chosen.items():
        if is_word(bounds[key]):
            continue
        tried = {entry[key] for entry in grid}
        if len(tried) > 1 and value in {min(tried), max(tried)} - set(bounds[key]):
            edges.append(key)
    return edges


def _trial(params: Params, name: str, head: Head, chosen: dict[str, dict[str, Value]]) -> RunSpec:
    return method_run(params, name, params.seeds[0], head, chosen)
