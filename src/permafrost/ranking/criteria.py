"""Criteria: what scores the filters of every layer.

A criterion is a function with a decorator that says what it looks at: :func:`map_metric` the maps
of filters and classes, :func:`weights_criterion` the weights alone, :func:`response_criterion` how
filters respond to images, :func:`network_criterion` network and images in any way. In a file of
this package it has its own name; a user's own is ``module:function``.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from permafrost.errors import InputError, NotFiniteError
from permafrost.explain._checks import check_result
from permafrost.ranking.evidence import Evidence
from permafrost.registry import Registry

# What a response is a response of.
Explained = Literal["loss", "logit"]
FILTERS = float("inf")  # passes: one for each filter
EXPLAINED: tuple[Explained, ...] = ("loss", "logit")
MAPS, WEIGHTS, RESPONSE, NETWORK = "maps", "weights", "response", "network"


class Criterion(Protocol):
    """A function that scores filters.

    Attributes
    ----------
    looks_at : {"maps", "weights", "response", "network"}
        What its arguments are, as its decorator says.
    """

    looks_at: str

    def __call__(self, *evidence: Any) -> Any:
        """Return scores."""
        ...


class MapMetric(Protocol):
    """A function of filter maps (F, H, W) and class maps (C, H, W) to scores (F, C).

    The attribute ``higher_is_better`` is True where a higher score means that the maps are more
    alike; :func:`map_metric` sets it.
    """

    higher_is_better: bool

    def __call__(self, filter_maps: Tensor, class_maps: Tensor, /) -> Tensor:
        """Score every filter map against every class map."""
        ...


#: The criteria, by name.
CRITERIA: Registry[Criterion] = Registry(
    "criterion",
    "permafrost.ranking",
    lambda thing: callable(thing) and hasattr(thing, "looks_at"),
    "decorate it with map_metric(higher_is_better=...), weights_criterion, response_criterion or "
    "network_criterion of permafrost.ranking",
)


class _LookingAt(Mapping[str, Any]):
    """The criteria of the package that look at the same, by name."""

    def __init__(self, *what: str) -> None:
        self.what = what

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, Criterion]:
        return {name: found for name, found in CRITERIA.items() if found.looks_at in self.what}


#: The map metrics.
METRICS: Mapping[str, MapMetric] = _LookingAt(MAPS)
#: The criteria that look at weights alone, or at nothing.
CONTROLS: Mapping[str, Callable[[Evidence], dict[str, Tensor]]] = _LookingAt(WEIGHTS)
#: The criteria that are shown images.
RESPONSES: Mapping[str, Criterion] = _LookingAt(RESPONSE, NETWORK)

Function = TypeVar("Function", bound=Callable[..., Any])


def map_metric(
    *, higher_is_better: bool
) -> Callable[[Callable[[Tensor, Tensor], Tensor]], MapMetric]:
    """Declare a map metric and its direction.

    Parameters
    ----------
    higher_is_better : bool
        True for a similarity, False for a distance.

    Returns
    -------
    decorator : callable
        Sets the attribute ``higher_is_better`` on the function and returns that same function.

    Examples
    --------
    >>> @map_metric(higher_is_better=False)
    ... def mean_gap(filter_maps, class_maps):
    ...     return (filter_maps.mean((1, 2))[:, None] - class_maps.mean((1, 2))).abs()
    >>> mean_gap.higher_is_better
    False
    """

    def declare(function: Callable[[Tensor, Tensor], Tensor]) -> MapMetric:
        metric = cast(MapMetric, function)
        metric.higher_is_better = higher_is_better
        return _declare(metric, MAPS)

    return declare


def weights_criterion(function: Function) -> Function:
    """Declare a criterion that looks at weights alone.

    Parameters
    ----------
    function : callable
        Given :class:`Evidence`, of which it uses ``weights``, ``gammas`` and ``seed``, it returns
        scores (F, 1) of every layer, by the layers' names; higher is better.
    """
    return _declare(function, WEIGHTS)


def response_criterion(
    function: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    of: Explained = "loss",
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Declare a criterion that looks at how filters respond to images.

    Parameters
    ----------
    function : callable
        Given a layer's feature map a and the gradient dy/da, both (N, F, H, W), it returns a number
        for each image and filter, (N, F); a filter's score for a class is the mean over the class's
        images, and higher is better. It leaves what it is given as it is.
    of : {"loss", "logit"}
        What y is: the cross entropy of the image's own true label, or that label's logit.
    finish : callable, optional
        Given a layer's means (F, C), it returns the scores (F, C).

    Returns
    -------
    callable
        The function itself; a decorator where options are given.
    """
    if of not in EXPLAINED:
        raise ValueError(f"of must be one of {EXPLAINED}, not {of!r}")

    def declare(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
        declared: Any = function
        declared.of, declared.finish = of, finish
        return _declare(declared, RESPONSE)

    return declare if function is None else declare(function)


def network_criterion(
    function: Callable[..., Mapping[str, Tensor]] | None = None,
    *,
    class_maps: bool = False,
    passes: float = 1,
) -> Any:
    """Declare a criterion that looks at network and images in any way.

    Parameters
    ----------
    function : callable
        Given the network, in eval mode and in true float32, batches of images (N, 3, H, W) with
        labels (N,), to be run through once, and the number of classes C, it returns scores (F, C)
        of every convolution that runs, by the convolutions' names; higher is better. It leaves the
        network as it is. :func:`permafrost.ranking.class_means` averages by class.
    class_maps : bool
        Whether it is given the classes' saliency maps too, (C, H, W), as a fourth argument.
    passes : float
        How often it runs the network over the images, roughly, or ``FILTERS``, once for each
        filter: only to tell beforehand how long it takes, and not to try it then.

    Returns
    -------
    callable
        The function itself; a decorator where options are given.
    """

    def declare(function: Callable[..., Mapping[str, Tensor]]) -> Any:
        declared: Any = function
        declared.class_maps, declared.passes = class_maps, passes
        return _declare(declared, NETWORK)

    return declare if function is None else declare(function)


def _declare(function: Any, looks_at: str) -> Any:
    function.looks_at = looks_at
    CRITERIA.add(function.__name__, function)
    return function


def known_criteria() -> tuple[str, ...]:
    """Return the criteria of the package."""
    return tuple(CRITERIA)


def passes_of(criterion: str) -> float:
    """Return how often a criterion runs the network over the images, roughly."""
    return float(getattr(CRITERIA.find(criterion), "passes", 1))


def needs_class_maps(criterion: str) -> bool:
    """Tell whether a criterion that is shown images is given the classes' maps too."""
    return bool(getattr(CRITERIA.find(criterion), "class_maps", False))


def needs_maps(criterion: str) -> bool:
    """Tell whether a criterion, built in or a user's own, is a map metric."""
    return CRITERIA.find(criterion).looks_at == MAPS


def needs_images(criterion: str) -> bool:
    """Tell whether a criterion, built in or a user's own, has to be shown images."""
    return CRITERIA.find(criterion).looks_at in (RESPONSE, NETWORK)


def check_criterion(name: str) -> None:
    """Check that a criterion can be used; a user's ``module:function`` is imported for that.

    Parameters
    ----------
    name : str
        One of :func:`known_criteria`, or ``module:function``.

    Raises
    ------
    InputError
        If the name is unknown or the user's criterion cannot be used.
    """
    CRITERIA.find(name)


def get_metric(name: str) -> MapMetric:
    """Look up a map metric by its name.

    Parameters
    ----------
    name : str
        A key of ``METRICS``, or ``module:function`` for a user's own metric, which
        :func:`map_metric` decorates. Its module is imported.

    Returns
    -------
    metric : MapMetric

    Raises
    ------
    InputError
        If the name is unknown, the user's metric cannot be used, or it is no map metric.
    """
    if not needs_maps(name):
        raise InputError(f"criterion '{name}' is no map metric")
    return cast(MapMetric, CRITERIA.find(name))


def evaluate_metric(metric: MapMetric, filter_maps: Tensor, class_maps: Tensor) -> Tensor:
    """Compute a metric's scores, without gradients, and check maps and scores.

    Parameters
    ----------
    metric : MapMetric
        One of ``METRICS`` or a user's own.
    filter_maps, class_maps : Tensor (F, H, W) and (C, H, W)
        Maps of any scale.

    Returns
    -------
    scores : Tensor (F, C)
        As the metric gives them, in its own direction.

    Raises
    ------
    ValueError
        If the maps' shapes do not fit or a map is not finite.
    InputError
        If the metric's result is not a finite floating-point tensor of shape (F, C).
    """
    check_map_pair(filter_maps, class_maps)
    with torch.no_grad():
        scores = metric(filter_maps, class_maps)
    name = getattr(metric, "__name__", type(metric).__name__)
    return check_result(f"metric '{name}'", scores, (len(filter_maps), len(class_maps)))


def check_map_pair(filter_maps: Tensor, class_maps: Tensor) -> None:
    """Refuse maps unless both are (N, H, W) with one H and W, not empty, and finite."""
    for name, maps in (("filter_maps", filter_maps), ("class_maps", class_maps)):
        if maps.ndim != 3 or 0 in maps.shape:
            raise ValueError(f"{name} have shape {tuple(maps.shape)}, not (N, H, W) without a 0")
        if not torch.isfinite(maps).all():
            raise NotFiniteError(f"{name} hold values that are not finite")
    if filter_maps.shape[1:] != class_maps.shape[1:]:
        raise ValueError(
            f"filter_maps are {tuple(filter_maps.shape[1:])}, "
            f"but class_maps {tuple(class_maps.shape[1:])}"
        )


def score_filters(criterion: str, evidence: Evidence) -> dict[str, Tensor]:
    """Score the filters of every layer; higher is better whatever the criterion.

    Parameters
    ----------
    criterion : str
        One of :func:`known_criteria`, or ``module:function`` for a user's own.
    evidence : Evidence
        Weights (and gammas) for the controls; weights, filter maps and class maps for the map
        metrics; weights and class scores for the criteria that are shown images.

    Returns
    -------
    scores : dict[str, Tensor (F, C)]
        Keys in the order of the weights. A metric of which lower values are better is negated.
        Controls know no classes and give (F, 1).

    Raises
    ------
    InputError
        If the criterion is unknown, a user's own gives unusable scores or leaves a layer out, or
        the network lacks what the criterion looks at.
    ValueError
        If maps that the criterion needs are missing or do not fit, or are not finite.
    """
    function = CRITERIA.find(criterion)
    if function.looks_at == MAPS:
        return _map_scores(criterion, cast(MapMetric, function), evidence)
    if function.looks_at == WEIGHTS:
        filters = {layer: len(weight) for layer, weight in evidence.weights.items()}
        with torch.no_grad():
            return check_layers(criterion, function(evidence), filters, 1)
    return _class_scores(criterion, evidence)


def check_layers(
    criterion: str, found: object, filters: Mapping[str, int], classes: int
) -> dict[str, Tensor]:
    """Refuse what a criterion has returned unless it is scores (F, C) of each of these layers."""
    if not isinstance(found, Mapping):
        raise InputError(f"criterion '{criterion}' returned {type(found).__name__}, not a dict")
    return {
        layer: check_result(
            f"criterion '{criterion}' of layer '{layer}'", found.get(layer), (count, classes)
        )
        for layer, count in filters.items()
    }


def _class_scores(criterion: str, evidence: Evidence) -> dict[str, Tensor]:
    """Return the scores of a criterion that was shown images."""
    layers = evidence.class_scores.get(criterion, {})
    for layer, weight in evidence.weights.items():
        if layer not in layers or len(layers[layer]) != len(weight):
            raise InputError(f"criterion '{criterion}' gave no class scores of layer '{layer}'")
    return {layer: layers[layer] for layer in evidence.weights}


def _map_scores(name: str, metric: MapMetric, evidence: Evidence) -> dict[str, Tensor]:
    """Score the filters by a map metric, turned so that higher is better."""
    class_maps = evidence.class_maps
    if class_maps is None:
        raise ValueError(f"criterion '{name}' needs class maps")
    scores = {}
    for layer, weight in evidence.weights.items():
        maps = evidence.filter_maps.get(layer)
        if maps is None or len(maps) != len(weight):
            raise ValueError(f"criterion '{name}' needs {len(weight)} filter maps of '{layer}'")
        values = evaluate_metric(metric, maps, class_maps)
        scores[layer] = values if metric.higher_is_better else -values
    return scores
