"""Ranking: which filters of a layer matter for the classes that are to be kept.

Scores come from a criterion, an order from the scores, and a mask of frozen filters from the order;
:mod:`permafrost.ranking.method` takes all steps.

Examples
--------
>>> import torch
>>> from permafrost.ranking import Evidence, frozen_mask, order_filters, score_filters
>>> class_maps = torch.eye(4)[None]
>>> filter_maps = torch.stack([torch.eye(4).flip(0), torch.eye(4), torch.ones(4, 4)])
>>> evidence = Evidence(
...     weights={"conv1": torch.ones(3, 1, 3, 3)},
...     filter_maps={"conv1": filter_maps},
...     class_maps=class_maps,
... )
>>> order = order_filters(score_filters("mse", evidence)["conv1"])
>>> order.tolist()
[1, 2, 0]
>>> frozen_mask(order, 0.25).tolist()
[False, True, False]
"""

from permafrost.ranking.class_scores import class_means, filter_responses
from permafrost.ranking.criteria import (
    CONTROLS,
    CRITERIA,
    METRICS,
    RESPONSES,
    Criterion,
    MapMetric,
    check_criterion,
    evaluate_metric,
    get_metric,
    known_criteria,
    map_metric,
    needs_images,
    needs_maps,
    network_criterion,
    response_criterion,
    score_filters,
    weights_criterion,
)
from permafrost.ranking.evidence import Evidence, combine_classes, network_evidence
from permafrost.ranking.relevance import FilterRelevance
from permafrost.ranking.selection import (
    AGGREGATES,
    filters_of,
    frozen_mask,
    mask_of,
    order_filters,
)
from permafrost.shares import count_frozen

__all__ = [
    "AGGREGATES",
    "CONTROLS",
    "CRITERIA",
    "METRICS",
    "RESPONSES",
    "Criterion",
    "Evidence",
    "FilterRelevance",
    "MapMetric",
    "check_criterion",
    "class_means",
    "combine_classes",
    "count_frozen",
    "evaluate_metric",
    "filter_responses",
    "filters_of",
    "frozen_mask",
    "get_metric",
    "known_criteria",
    "map_metric",
    "mask_of",
    "needs_images",
    "needs_maps",
    "network_criterion",
    "network_evidence",
    "order_filters",
    "response_criterion",
    "score_filters",
    "weights_criterion",
]
