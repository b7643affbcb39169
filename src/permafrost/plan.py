"""Which trainings the parameters ask for."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import cast

from permafrost.hyper import Value, number
from permafrost.models import Head
from permafrost.params import Params
from permafrost.ranking import CONTROLS
from permafrost.runs.spec import RunSpec
from permafrost.strategies import STRATEGIES
from permafrost.strategies.sized import SHARE_TWINS

# Under each head, each strategy's hyperparameters: what stage tune has chosen.
Chosen = Mapping[str, Mapping[str, Mapping[str, Value]]]


def heads(params: Params) -> list[Head]:
    """Return the sweep's heads."""
    return cast(list[Head], params.sweep.heads)


def sweep_runs(params: Params, chosen: Chosen) -> list[RunSpec]:
    """Return every run of the sweep: strategies x metrics x pcts x heads x seeds, and their twins.

    ``freeze`` comes with each of ``sweep.pcts`` and the chosen share; ``joint`` in both lengths,
    under each head and under one softmax of all classes, for the first ``sweep.joint_seeds``.
    """
    sweep = params.sweep
    runs = []
    for head, seed, strategy in product(heads(params), params.seeds, sweep.strategies):
        if strategy == "freeze":
            pcts = sorted({*sweep.pcts, number(chosen[head]["freeze"], "pct")})
            runs += [
                RunSpec(strategy, seed, head, metric, pct)
                for metric, pct in product(sweep.metrics, pcts)
            ]
        elif strategy != "joint":
            runs.append(method_run(params, strategy, seed, head, chosen[head]))
    if "joint" in sweep.strategies:
        joint_heads = dict.fromkeys([*heads(params), cast(Head, "expanding")])
        tasks = len(params.split.sizes)
        runs += [
            RunSpec("joint", seed, head, hyper=(("passes", passes),))
            for head, seed, passes in product(
                joint_heads, params.seeds[: sweep.joint_seeds], (1, tasks)
            )
        ]
    if sweep.twins:
        runs += [twin for run in runs for twin in twins_of(run)]
    return list(dict.fromkeys(runs))


def twins_of(run: RunSpec) -> list[RunSpec]:
    """Return the controls of a run that uses an explanation: the same, something else in its place.

    A share of filters that a criterion ranks is controlled by filters that chance ranks.
    """
    made = STRATEGIES[run.strategy]
    if run.twin is not None:
        return []
    if made.freezes_ranked:
        if run.metric in CONTROLS:
            return []
        twin = None if run.strategy == "freeze" else "chance"
        return [replace(run, metric="random", twin=twin)]
    twins = made.controls(run.hyperparameters)
    if run.metric in CONTROLS:  # it has no explained ranking, but may have explained shares
        twins = tuple(twin for twin in twins if twin in SHARE_TWINS)
    return [replace(run, twin=twin) for twin in twins]


def method_run(
    params: Params,
    strategy: str,
    seed: int,
    head: Head,
    chosen: Mapping[str, Mapping[str, Value]],
) -> RunSpec:
    """Return a strategy's run with its chosen hyperparameters; frozen filters by freeze.metric."""
    hyper = dict(chosen.get(strategy, {}))
    made = STRATEGIES[strategy]
    if not made.freezes_ranked:
        metric = params.freeze.metric if made.ranks else None
        return RunSpec(strategy, seed, head, metric, hyper=tuple(sorted(hyper.items())))
    hyper.pop("pct", None)
    pct = number(chosen["freeze"], "pct")
    return RunSpec(strategy, seed, head, params.freeze.metric, pct, tuple(sorted(hyper.items())))


def grids(params: Params) -> dict[str, list[dict[str, Value]]]:
    """Return what stage tune tries for each strategy of the sweep; first the frozen share."""
    wanted = ["freeze", *(name for name in params.sweep.strategies if name != "freeze")]
    tuned = [name for name in wanted if STRATEGIES[name].hyper]
    return {name: params.tune.get(name) or [STRATEGIES[name].defaults()] for name in tuned}
