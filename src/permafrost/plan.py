"""Which trainings the parameters ask for."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

from permafrost.evaluation import share
from permafrost.models import Head
from permafrost.params import Params

# Under each head, each strategy's hyperparameters: what stage tune has chosen.
Chosen = Mapping[str, Mapping[str, Mapping[str, float]]]

FROZEN = ("freeze", "freeze_ewc", "freeze_lwf")


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
        What ranks the filters; strategies that freeze filters only.
    pct : float or None
        Share of every layer's filters that is frozen, 0..1; the same strategies.
    hyper : tuple of (str, float)
        The strategy's other hyperparameters by name. ``joint`` has ``passes``: its epochs as a
        multiple of one task's.
    """

    strategy: str
    seed: int
    head: Head
    metric: str | None = None
    pct: float | None = None
    hyper: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "CellSpec":
        """Return the cell that a row of results is of."""
        hyper = tuple(sorted(row["hyper"].items()))
        return cls(row["strategy"], row["seed"], row["head"], row["metric"], row["pct"], hyper)

    @property
    def name(self) -> str:
        """Return a short name for people."""
        parts = [self.strategy, self.metric, None if self.pct is None else share(self.pct)]
        parts += [f"{name} {value:g}" for name, value in self.hyper]
        return " ".join(part for part in [*parts, self.head, f"seed {self.seed}"] if part)

    @property
    def hyperparameters(self) -> dict[str, float]:
        """Return ``hyper`` as a dict."""
        return dict(self.hyper)


def heads(params: Params) -> list[Head]:
    """Return the sweep's heads."""
    return cast(list[Head], params.sweep.heads)


def sweep_cells(params: Params, chosen: Chosen) -> list[CellSpec]:
    """Return every cell of the sweep: strategies x metrics x pcts x heads x seeds.

    ``freeze`` comes with each of ``sweep.pcts`` and the chosen share; ``joint`` in both lengths,
    under each head and under one softmax of all classes.
    """
    sweep = params.sweep
    cells = []
    for head, seed, strategy in product(heads(params), params.seeds, sweep.strategies):
        if strategy == "freeze":
            pcts = sorted({*sweep.pcts, chosen[head]["freeze"]["pct"]})
            cells += [
                CellSpec(strategy, seed, head, metric, pct)
                for metric, pct in product(sweep.metrics, pcts)
            ]
        elif strategy != "joint":
            cells.append(method_cell(params, strategy, seed, head, chosen[head]))
    if "joint" in sweep.strategies:
        joint_heads = dict.fromkeys([*heads(params), cast(Head, "expanding")])
        cells += [
            CellSpec("joint", seed, head, hyper=(("passes", passes),))
            for head, seed, passes in product(joint_heads, params.seeds, (1, params.split.tasks))
        ]
    return cells


def method_cell(
    params: Params,
    strategy: str,
    seed: int,
    head: Head,
    chosen: Mapping[str, Mapping[str, float]],
) -> CellSpec:
    """Return a strategy's cell with its chosen hyperparameters; frozen filters by freeze.metric."""
    hyper = dict(chosen.get(strategy, {}))
    if strategy not in FROZEN:
        return CellSpec(strategy, seed, head, hyper=tuple(sorted(hyper.items())))
    hyper.pop("pct", None)
    metric, pct = params.freeze.metric, chosen["freeze"]["pct"]
    return CellSpec(strategy, seed, head, metric, pct, tuple(sorted(hyper.items())))


def grids(params: Params) -> dict[str, list[dict[str, float]]]:
    """Return what stage tune tries for each strategy of the sweep; first the frozen share."""
    declared: dict[str, Any] = params.tune.model_dump()
    wanted = ["freeze", *(name for name in params.sweep.strategies if name != "freeze")]
    return {name: declared[name] for name in wanted if name in declared}
