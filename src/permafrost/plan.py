"""Which trainings the parameters ask for."""

from collections.abc import Mapping
from itertools import product
from typing import cast

from permafrost.models import Head
from permafrost.params import Params
from permafrost.runs.spec import RunSpec
from permafrost.strategies import STRATEGIES

# Under each head, each strategy's hyperparameters: what stage tune has chosen.
Chosen = Mapping[str, Mapping[str, Mapping[str, float]]]


def heads(params: Params) -> list[Head]:
    """Return the sweep's heads."""
    return cast(list[Head], params.sweep.heads)


def sweep_runs(params: Params, chosen: Chosen) -> list[RunSpec]:
    """Return every run of the sweep: strategies x metrics x pcts x heads x seeds.

    ``freeze`` comes with each of ``sweep.pcts`` and the chosen share; ``joint`` in both lengths,
    under each head and under one softmax of all classes.
    """
    sweep = params.sweep
    runs = []
    for head, seed, strategy in product(heads(params), params.seeds, sweep.strategies):
        if strategy == "freeze":
            pcts = sorted({*sweep.pcts, chosen[head]["freeze"]["pct"]})
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
            for head, seed, passes in product(joint_heads, params.seeds, (1, tasks))
        ]
    return runs


def method_run(
    params: Params,
    strategy: str,
    seed: int,
    head: Head,
    chosen: Mapping[str, Mapping[str, float]],
) -> RunSpec:
    """Return a strategy's run with its chosen hyperparameters; frozen filters by freeze.metric."""
    hyper = dict(chosen.get(strategy, {}))
    if not STRATEGIES[strategy].freezes_ranked:
        return RunSpec(strategy, seed, head, hyper=tuple(sorted(hyper.items())))
    hyper.pop("pct", None)
    metric, pct = params.freeze.metric, chosen["freeze"]["pct"]
    return RunSpec(strategy, seed, head, metric, pct, tuple(sorted(hyper.items())))


def grids(params: Params) -> dict[str, list[dict[str, float]]]:
    """Return what stage tune tries for each strategy of the sweep; first the frozen share."""
    wanted = ["freeze", *(name for name in params.sweep.strategies if name != "freeze")]
    tuned = [name for name in wanted if STRATEGIES[name].hyper]
    return {name: params.tune.get(name) or [STRATEGIES[name].defaults()] for name in tuned}
