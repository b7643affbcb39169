"""Plots of results: what is kept and what is learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from permafrost.evaluation import Interval, share
from permafrost.figures import COLOURS, cut, save_for_papers, subplots

_LABEL_SHOWN = 40  # characters of a line's name, which is beside the plot
_MARKERS = "os^DvP*X"  # not as many as colours: each round pairs them differently
_STROKES = ("-", "--", ":", "-.")
_LEGEND_ROWS = 26
_ROOM = 13  # of a marker that holds a number, points
_AXES = ("learned", "kept")


def draw_trade_off(
    path: Path,
    points: Sequence[Mapping[str, Any]],
    single: Sequence[Mapping[str, Any]],
    tasks: int,
    about: str,
) -> None:
    """Draw accuracy on the earlier tasks against the last one's along pct, a line for each metric.

    Parameters
    ----------
    path : Path
        The picture to write.
    points : sequence of mapping
        ``metric``, ``pct`` and the intervals ``kept``, of the mean over the tasks before the last,
        and ``learned``, of the last task.
    single : sequence of mapping
        Other strategies: ``label`` and the two intervals.
    tasks : int
        T.
    about : str
        What the runs have in common, for the caption.
    """
    from matplotlib.patheffects import withStroke

    metrics = list(dict.fromkeys(point["metric"] for point in points))
    count = len(metrics) + len(single)
    columns = -(-count // _LEGEND_ROWS)  # one more for every so many lines
    figure, axis = subplots(figsize=(6.5 + 2.5 * columns, 5.5))
    for number, metric in enumerate(metrics):
        line = sorted((p for p in points if p["metric"] == metric), key=lambda p: p["pct"])
        stroke = _STROKES[number // len(COLOURS) % 4]
        _error_bars(axis, line, metric, number, linestyle=stroke, markersize=_ROOM)
        for point in line:  # in its marker, where it collides with no other
            axis.annotate(
                share(point["pct"]).removesuffix("%"),
                (100 * point["learned"].mean, 100 * point["kept"].mean),
                ha="center",
                va="center",
                fontsize=6,
                color="white",
                path_effects=[withStroke(linewidth=1, foreground="black")],
            )
    for number, point in enumerate(single, start=len(metrics)):
        _error_bars(axis, [point], point["label"], number, linestyle="none")
    earlier = "accuracy on task 1" if tasks == 2 else f"mean accuracy on tasks 1 to {tasks - 1}"
    axis.set_xlabel(f"learned: accuracy on task {tasks}, %")
    axis.set_ylabel(f"kept: {earlier}, %")
    bars = any(p[name].low is not None for p in [*points, *single] for name in _AXES)
    title = "Kept and learned" + ("; in markers: % frozen" if points else "")
    title += "; bars: 95% intervals over the seeds" if bars else ""
    axis.set_title(f"{title}\n{about}", fontsize=10)
    axis.grid(alpha=0.3)
    if count:
        figure.legend(fontsize=8, loc="outside right upper", ncols=columns, markerscale=0.6)
    save_for_papers(figure, path)


def _error_bars(
    axis: Any, points: Sequence[Mapping[str, Any]], label: str, number: int, **style: Any
) -> None:
    across, up = (_bars([point[name] for point in points]) for name in _AXES)
    axis.errorbar(
        [100 * point["learned"].mean for point in points],
        [100 * point["kept"].mean for point in points],
        xerr=across,
        yerr=up,
        color=COLOURS[number % len(COLOURS)],
        marker=_MARKERS[number % len(_MARKERS)],
        label=cut(label, _LABEL_SHOWN),
        capsize=2,
        elinewidth=0.7,
        **style,
    )


def _bars(intervals: Sequence[Interval]) -> tuple[list[float], list[float]]:
    """Return how far the bars reach below and above the means; not at all without an interval."""
    below = [0.0 if i.low is None else 100 * max(0.0, i.mean - i.low) for i in intervals]
    above = [0.0 if i.high is None else 100 * max(0.0, i.high - i.mean) for i in intervals]
    return below, above
