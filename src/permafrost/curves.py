"""Curves: what MLflow draws against the share of frozen filters, a run for each method."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from permafrost.claims import kept_and_learned
from permafrost.evaluation import accuracy_name
from permafrost.figures import COLOURS
from permafrost.params import Params
from permafrost.runs.spec import RunSpec
from permafrost.shown import shown_params
from permafrost.tables import Row, groups, measure
from permafrost.tracking import CURVES, RunRecord

# What sets curves of the same name apart; whatever it holds is added to, not replaced.
_SAME = {"split", "model", "train", "saliency", "visualize", "consolidate", "runtime", "seeds"}


# The view of the curves that `permafrost ui` opens.
VIEW = "permafrost"
_CHARTS = ("kept", "learned", "acc_mean", "forgetting")


def curves_view() -> dict[str, Any]:
    """Return the view of the curves as MLflow's page keeps one: which charts, in which order.

    Four charts against the percent of frozen filters, all runs by name; the intervals are folded.
    """
    shown = {
        "uuid": VIEW,
        "name": "Percent of filters frozen",
        "display": True,
        "columns": 2,
    }
    more = {"uuid": "more", "name": "Model metrics", "display": False, "isGenerated": True}
    intervals = {"uuid": "interval", "name": "interval", "display": False, "isGenerated": True}
    sections = [shown, more, intervals]
    return {
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOWALL",
        "hideEmptyCharts": True,
        "compareRunCharts": [_chart(metric) for metric in _CHARTS],
        "compareRunSections": [{"isReordered": True, "deleted": False} | s for s in sections],
    }


def _chart(metric: str) -> dict[str, Any]:
    return {
        "uuid": metric,
        "type": "LINE",
        "metricSectionId": VIEW,
        "deleted": False,
        "isGenerated": False,
        "displayName": metric,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "xAxisKey": "step",
        "yAxisKey": "metric",
        "runsCountToCompare": 100,
        "range": {},
    }


def curve_records(rows: Sequence[Row], params: Params) -> list[RunRecord]:
    """Return a run for each curve of the comparison: strategy, metric, head and all but the share.

    Its accuracies, their means over the seeds and 95% intervals are logged at step = percent of
    frozen filters; fine-tuning is each ranking's step 0. A method without a share is a point at 0.

    Parameters
    ----------
    rows : sequence of dict
        Of the sweep.
    params : Params
        All parameters.
    """
    done = [_comparable(row) for row in rows if row["status"] == "done"]
    records = []
    for _, of_head in groups(done, "head"):
        start = [row for row in of_head if row["strategy"] == "finetune"]
        found = groups(of_head, "strategy", "metric", "settings", "twin")
        # Rankings first, as in the other pictures of a head: so they have the same colours.
        found = sorted(found, key=lambda curve: curve[0]["strategy"] != "freeze")
        for number, (group, members) in enumerate(found):
            frozen = group["strategy"] == "freeze"
            points = groups([*(start if frozen else []), *members], "pct")
            records.append(_record(members, points, params, COLOURS[number % len(COLOURS)]))
    return records


def _comparable(row: Row) -> Row:
    settings = json.dumps(row["hyper"], sort_keys=True)
    return row | kept_and_learned(row) | {"settings": settings, "twin": row.get("twin")}


def _record(
    members: list[Row], points: list[tuple[Row, list[Row]]], params: Params, colour: str
) -> RunRecord:
    spec, first = RunSpec.of(members[0]), members[0]
    passes = first["hyper"].get("passes")
    named = [first["strategy"], first["metric"], f"twin by {spec.twin}" if spec.twin else None]
    named += [f"{params.joint_epochs(passes)} epochs" if passes else None]
    name = " ".join(part for part in [*named, spec.head] if part)
    identity = params.model_dump(include=_SAME) | {"curve": name, "hyper": first["settings"]}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    shown = shown_params(params, spec) | {"seeds": len({row["seed"] for row in members})}
    return RunRecord(
        key=f"curve-{digest[:26]}",
        experiment=CURVES,
        name=name,
        params={k: v for k, v in shown.items() if k not in ("pct", "seed")},
        curves=[{"step": round(100 * (g["pct"] or 0))} | _measured(rows) for g, rows in points],
        tags={"kind": "curve", "runs": ",".join(row["key"] for row in members)},
        colour=colour,
    )


def _measured(rows: list[Row]) -> dict[str, Any]:
    """Return means and intervals over the seeds at one share."""
    tasks = [accuracy_name(task) for task in range(len(rows[0]["R"][-1]))]
    found: dict[str, Any] = {}
    for name in ("kept", "learned", "acc_mean", "forgetting", *tasks):
        interval = measure(rows, name)
        if interval is None:
            continue
        found[name] = interval.mean
        if interval.low is not None and interval.high is not None:
            # A section of its own in MLflow's charts.
            found |= {f"interval/{name}_low": interval.low, f"interval/{name}_high": interval.high}
    return found
