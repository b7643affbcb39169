"""The page's charts, as Plotly's figures; colours that the colour-blind can tell apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from permafrost.claims import kept_and_learned
from permafrost.evaluation import Interval, share
from permafrost.figures import COLOURS
from permafrost.tables import Row, groups, measure

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "pentagon", "cross")
_PLACES = ("top right", "bottom left", "top left", "bottom right")
_DASHES = ("solid", "dash", "dot", "dashdot")


def _style(number: int) -> dict[str, Any]:
    """Return a colour, a marker and a stroke that no other of many lines has together."""
    return {
        "marker": {
            "color": COLOURS[number % len(COLOURS)],
            "symbol": _SYMBOLS[number % len(_SYMBOLS)],
            "size": 10,
        },
        "line": {"dash": _DASHES[number // len(COLOURS) % len(_DASHES)]},
    }


def _figure(x: str, y: str, traces: Sequence[Any], **layout: Any) -> dict[str, Any]:
    figure = go.Figure(list(traces))
    figure.update_layout(
        xaxis_title=x,
        yaxis_title=y,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 60, "r": 16, "t": 16, "b": 50},
        template="none",
        **layout,
    )
    found: dict[str, Any] = figure.to_plotly_json()
    return found


def trade_off(rows: Sequence[Row], tasks: int) -> dict[str, Any]:
    """Draw what is kept against what is learned: lines along the share, and other methods.

    Parameters
    ----------
    rows : sequence of dict
        Finished runs under one head, each with a ``label``, its method's name.
    tasks : int
        T.
    """
    traces: list[Any] = []
    for number, (name, members) in enumerate(_methods(rows)):
        points = groups(members, "pct")
        ordered = sorted(points, key=lambda point: point[0]["pct"] or 0)
        traces += _line(name, ordered, _style(number), _PLACES[number % len(_PLACES)])
    earlier = "task 1" if tasks == 2 else f"tasks 1 to {tasks - 1}, mean"
    return _figure(f"learned: accuracy on task {tasks}, %", f"kept: {earlier}, %", traces)


def _methods(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Return each method's name and rows: rankings first, each with all of its shares."""
    frozen = [row for row in rows if row["strategy"] == "freeze"]
    others = [row for row in rows if row["strategy"] != "freeze"]
    return [
        *((f"ranked by {group['metric']}", mine) for group, mine in groups(frozen, "metric")),
        *((group["label"], mine) for group, mine in groups(others, "label")),
    ]


def forgetting(rows: Sequence[Row]) -> dict[str, Any]:
    """Draw each run's forgetting against how far the responses of its live filters have moved.

    Parameters
    ----------
    rows : sequence of dict
        As for :func:`trade_off`; runs without a drift are left out.
    """
    traces = [
        go.Scatter(
            x=[row["drift_live"] for row in known],
            y=[100 * row["forgetting"] for row in known],
            mode="markers",
            name=name,
            marker={**_style(number)["marker"], "size": 8},
            hovertemplate=f"{name}<br>drift %{{x:.2f}}, forgetting %{{y:.1f}}<extra></extra>",
        )
        for number, (name, mine) in enumerate(_methods(rows))
        if (known := [row for row in mine if row.get("drift_live") is not None])
    ]
    return _figure("drift of live filters", "forgetting, points", traces)


def _line(
    name: str, points: Sequence[tuple[Row, list[Row]]], style: dict[str, Any], place: str
) -> list[Any]:
    """Return the means with their intervals, and behind them the seeds."""
    measured = [(group, [kept_and_learned(row) for row in rows]) for group, rows in points]
    ends = {axis: [measure(found, axis) for _, found in measured] for axis in ("learned", "kept")}
    shares = ["" if group["pct"] is None else share(group["pct"]) for group, _ in measured]
    seeds = [row for _, found in measured for row in found]
    dots = go.Scatter(
        x=[100 * row["learned"] for row in seeds],
        y=[100 * row["kept"] for row in seeds],
        mode="markers",
        marker={**style["marker"], "size": 5},
        opacity=0.4,
        showlegend=False,
        hoverinfo="skip",
        legendgroup=name,
    )
    means = go.Scatter(
        x=[100 * found.mean for found in ends["learned"] if found],
        y=[100 * found.mean for found in ends["kept"] if found],
        error_x=_bars(ends["learned"]),
        error_y=_bars(ends["kept"]),
        mode="lines+markers+text",
        text=shares,
        textposition=place,
        name=name,
        legendgroup=name,
        hovertemplate=f"{name} %{{text}}<br>learned %{{x:.1f}}, kept %{{y:.1f}}<extra></extra>",
        **style,
    )
    return [dots, means]


def _bars(intervals: Sequence[Interval | None]) -> dict[str, Any]:
    """Return how far the bars reach; of one seed not at all."""
    known = [found for found in intervals if found]
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * ((i.high if i.high is not None else i.mean) - i.mean) for i in known],
        "arrayminus": [100 * (i.mean - (i.low if i.low is not None else i.mean)) for i in known],
        "thickness": 1,
        "width": 3,
    }


def epochs(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Draw the accuracy on each task after each epoch: the mean, and behind it the seeds.

    Parameters
    ----------
    curves : sequence of mapping
        ``epoch``, ``accuracy``, ``seed`` and ``task``.
    """
    traces: list[Any] = []
    rows = [dict(row) for row in curves]
    for number, (task, members) in enumerate(groups(rows, "task")):
        style = _style(number)
        for _, seed in groups(members, "seed"):
            traces.append(_curve(seed, style, opacity=0.3, showlegend=False, hoverinfo="skip"))
        means = [
            {"epoch": at["epoch"], "accuracy": sum(r["accuracy"] for r in found) / len(found)}
            for at, found in groups(members, "epoch")
        ]
        traces.append(_curve(means, style, name=f"task {task['task']}"))
    return _figure("epoch of the further tasks", "accuracy, %", traces)


def _curve(rows: Sequence[Row], style: dict[str, Any], **options: Any) -> Any:
    return go.Scatter(
        x=[row["epoch"] for row in rows],
        y=[100 * row["accuracy"] for row in rows],
        mode="lines",
        line={**style["line"], "color": style["marker"]["color"]},
        **options,
    )


def drift(layers: Sequence[str], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Draw how far responses have moved by layer, of frozen and of live filters; mean over seeds.

    Parameters
    ----------
    layers : sequence of str
        In the order in which they run.
    records : sequence of mapping
        ``drift`` of each seed: by layer ``frozen`` and ``live``, None where there is no filter.
    """
    traces = []
    for number, part in enumerate(("frozen", "live")):
        means = []
        for layer in layers:
            known = [
                r["drift"][layer][part] for r in records if r["drift"][layer][part] is not None
            ]
            means.append(sum(known) / len(known) if known else None)
        traces.append(
            go.Bar(x=layers, y=means, name=f"{part} filters", marker_color=COLOURS[number])
        )
    return _figure("layer", "drift of the response", traces, barmode="group")


def capacity(layers: Sequence[str], chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Draw how many filters of each layer are frozen before the second task.

    Parameters
    ----------
    layers : sequence of str
        In the order in which they run.
    chosen : mapping of str to mapping
        Of each layer ``filters`` and the list ``frozen``.
    """
    frozen = [len(chosen[layer]["frozen"]) for layer in layers]
    free = [chosen[layer]["filters"] - count for layer, count in zip(layers, frozen, strict=True)]
    traces = [
        go.Bar(x=layers, y=counts, name=name, marker_color=COLOURS[number])
        for number, (name, counts) in enumerate((("frozen", frozen), ("free", free)))
    ]
    return _figure("layer", "filters", traces, barmode="stack")
