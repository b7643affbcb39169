"""Ranking: which filters of a layer matter for the classes that are to be kept.

Scores come from a criterion (a map metric, a control or a response criterion), an order from the
scores, and a mask of frozen filters from the order.

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

from permafrost.ranking.criteria import (
    CONTROLS,
    Criterion,
    Evidence,
    check_criterion,
    combine_classes,
    known_criteria,
    needs_maps,
    network_evidence,
    own_code,
    score_filters,
)
from permafrost.ranking.metrics import (
    METRICS,
    MapMetric,
    evaluate_metric,
    get_metric,
    map_metric,
)
from permafrost.ranking.relevance import FilterRelevance
from permafrost.ranking.responses import RESPONSES, filter_responses
from permafrost.ranking.selection import AGGREGATES, count_frozen, frozen_mask, order_filters

__all__ = [
    "AGGREGATES",
    "CONTROLS",
    "METRICS",
    "RESPONSES",
    "Criterion",
    "Evidence",
    "FilterRelevance",
    "MapMetric",
    "check_criterion",
    "combine_classes",
    "count_frozen",
    "evaluate_metric",
    "filter_responses",
    "frozen_mask",
    "get_metric",
    "known_criteria",
    "map_metric",
    "needs_maps",
    "network_evidence",
    "order_filters",
    "own_code",
    "score_filters",
]
