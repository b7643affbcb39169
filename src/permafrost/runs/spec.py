"""What a run is, as a value: it can be compared, hashed, pickled and sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from permafrost.evaluation import share
from permafrost.hyper import Value, as_text

if TYPE_CHECKING:
    from torch import Tensor

    from permafrost.models import Head
    from permafrost.strategies.base import Keep
    from permafrost.training import TrainingConfig


@dataclass(frozen=True)
class RunSpec:
    """One run of the comparison.

    Attributes
    ----------
    strategy : str
        A name in ``STRATEGIES``, or ``module:Class``.
    seed : int
        One of ``seeds``.
    head : {"shared", "multi", "expanding"}
        How the network answers.
    metric : str or None
        What ranks the filters; strategies that freeze ranked filters only.
    pct : float or None
        Share of every layer's free filters that is frozen, 0..1; the same strategies.
    hyper : tuple of (str, float or str)
        The strategy's other hyperparameters by name. ``joint`` has ``passes``: its epochs as a
        multiple of one task's.
    twin : str or None
        What takes the explanation's place, if it is a control: one of the strategy's ``twins``.
    """

    strategy: str
    seed: int
    head: Head
    metric: str | None = None
    pct: float | None = None
    hyper: tuple[tuple[str, Value], ...] = ()
    twin: str | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> RunSpec:
        """Return the run that a row of results is of."""
        hyper = tuple(sorted(row["hyper"].items()))
        plain = row["strategy"], row["seed"], row["head"], row["metric"], row["pct"]
        return cls(*plain, hyper, row.get("twin"))

    @property
    def name(self) -> str:
        """Return a short name for people."""
        parts = [self.strategy, self.metric, None if self.pct is None else share(self.pct)]
        parts += [f"{name} {as_text(value)}" for name, value in self.hyper]
        parts += [f"twin by {self.twin}"] if self.twin else []
        return " ".join(part for part in [*parts, self.head, f"seed {self.seed}"] if part)

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """Return ``hyper`` as a dict."""
        return dict(self.hyper)


@dataclass(frozen=True, eq=False)
class Settings:
    """How every run of an experiment is done.

    Attributes
    ----------
    arch : str
        Of the network, a name in ``NETWORKS``, ``torchvision:NAME`` or ``module:function``.
    width : float
        Factor on its filters.
    batch_norm : bool
        Whether it has BatchNorms.
    weights : mapping of str to Tensor, or None
        Of its body, to begin with.
    train : TrainingConfig
        How a task is trained.
    keep : Keep
        How much methods keep of each task.
    """

    arch: str
    width: float
    batch_norm: bool
    weights: Mapping[str, Tensor] | None
    train: TrainingConfig
    keep: Keep
