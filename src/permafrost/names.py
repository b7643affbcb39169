"""Whether what the parameters name is there, and fits the rest of them.

:mod:`permafrost.params` knows which keys there are; what their names stand for is known by the
registries, whose things take PyTorch, and so seconds, to import.
"""

from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from permafrost.data import DATASETS
from permafrost.errors import InputError, printable
from permafrost.explain import SALIENCY_METHODS
from permafrost.hyper import is_allowed, is_word, span
from permafrost.models import HEADS, NETWORKS
from permafrost.params import MAX_NAME, Params, advise, load_params, shown, shown_key
from permafrost.ranking import AGGREGATES, CRITERIA
from permafrost.registry import Registry
from permafrost.strategies import STRATEGIES

T = TypeVar("T")


def load_checked(path: Path) -> Params:
    """Read params.yaml, and check what it names too.

    Raises
    ------
    InputError
        One line that names the key, what was wrong and what is allowed.
    """
    params = load_params(path)
    check_names(params, path.name)
    return params


def check_names(params: Params, source: str) -> None:
    """Check what parameters name.

    Parameters
    ----------
    params : Params
        All of them.
    source : str
        Where they are from, for the message.

    Raises
    ------
    InputError
        As :func:`load_checked`.
    """
    for complaint in _complaints(params):
        raise InputError(f"{source}: {printable(complaint)[:500]}")


def _complaints(params: Params) -> Iterator[str]:
    split, model, rank, sweep = params.split, params.model, params.rank, params.sweep
    listed = split.sources if isinstance(split.tasks, int) else [t.source for t in split.tasks]
    for place, source in enumerate(listed):
        key = "split" if isinstance(split.tasks, int) else f"split.tasks.{place}"
        yield from _unknown(f"{key}.dataset", source.dataset, DATASETS)
        if source.root is None and DATASETS.find(source.dataset).needs_root:
            yield f"{key}.root: dataset {source.dataset!r} needs the folder where its images lie"
    yield from _unknown("model.arch", model.arch, NETWORKS)
    yield from _no_choice("model.head", model.head, HEADS)
    yield from _unknown("saliency.method", params.saliency.method, SALIENCY_METHODS)
    for place, metric in enumerate(rank.metrics):
        yield from _unknown(f"rank.metrics.{place}", metric, CRITERIA)
    for place, metric in enumerate(params.stability.metrics):
        yield from _unknown(f"stability.metrics.{place}", metric, CRITERIA)
    yield from _unranked(params)
    yield from _no_choice("rank.aggregate", rank.aggregate, AGGREGATES)
    yield from _wrong_grids(params.tune)
    for place, strategy in enumerate(sweep.strategies):
        yield from _unknown(f"sweep.strategies.{place}", strategy, STRATEGIES)
    for place, head in enumerate(sweep.heads):
        yield from _no_choice(f"sweep.heads.{place}", head, HEADS)
    for name, head in product(sweep.strategies, sweep.heads):
        allowed = STRATEGIES[name].heads
        if head not in allowed:
            yield (
                f"sweep.strategies: {name} cannot answer under the head {head}; allowed: "
                f"{', '.join(allowed)}"
            )


def _unranked(params: Params) -> Iterator[str]:
    ranked, sweep = params.rank.metrics, params.sweep
    for key, metric in [
        ("freeze.metric", params.freeze.metric),
        *(("sweep.metrics", metric) for metric in sweep.metrics),
    ]:
        if metric not in ranked:
            yield (
                f"{key}: {shown(metric)} is not ranked; allowed: what rank.metrics lists "
                f"({', '.join(ranked)})"
            )
    if sweep.twins and "random" not in ranked:
        yield "sweep.twins: what chance ranks takes the metric random; list it in rank.metrics"
    if "freeze" in sweep.strategies and not sweep.metrics:
        yield "sweep: the strategy freeze needs at least one of sweep.metrics"


def _no_choice(key: str, name: str, allowed: Iterable[str]) -> Iterator[str]:
    if name not in allowed:
        yield f"{key}: {shown(name)} is unknown; allowed: {', '.join(allowed)}"


def _unknown(key: str, name: str, registry: Registry[T]) -> Iterator[str]:
    """Complain of what is neither a registered thing nor a ``module:Name`` that can be imported."""
    if name not in registry and not _is_own(name):
        known = ", ".join(registry)
        yield f"{key}: {shown(name)} is no {registry.kind}; allowed: {known}, or module:Name"
    try:
        registry.find(name)
    except InputError as error:
        yield f"{key}: {error}"


def _is_own(name: str) -> bool:
    """Return whether a name has the form of a user's own thing: module:Name."""
    module, colon, attribute = name.partition(":")
    parts = [*module.split("."), attribute]
    return bool(colon) and len(name) <= MAX_NAME and all(part.isidentifier() for part in parts)


def _wrong_grids(grids: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    for name, grid in grids.items():
        key = f"tune.{shown_key(name)}"
        if name not in STRATEGIES and not _is_own(name):
            yield f"{key}: unknown method; {advise(name, STRATEGIES)}"
        yield from _unknown(key, name, STRATEGIES)
        bounds = STRATEGIES[name].hyper
        if not bounds:
            yield f"{key}: has no hyperparameters; leave it out"
        for entry in grid:
            if entry.keys() != bounds.keys():
                yield f"{key}: {shown(entry)} must name exactly {', '.join(bounds)}"
            for hyper, allowed in bounds.items():
                if not is_allowed(entry[hyper], allowed):
                    must = "be one of" if is_word(allowed) else "lie in"
                    what = f"{must} {span(allowed)}, not {shown(entry[hyper])}"
                    yield f"{key}: {hyper} must {what}"
