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
# Of a share beside its point, in points: lines that are close have theirs apart.
_PLACES = ((4, 4), (-16, -10), (-16, 5), (4, -10))
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
    metrics = list(dict.fromkeys(point["metric"] for point in points))
    count = len(metrics) + len(single)
    columns = -(-count // _LEGEND_ROWS)  # one more for every so many lines
    figure, axis = subplots(figsize=(6.5 + 2.5 * columns, 5.5))
    for number, metric in enumerate(metrics):
        line = sorted((p for p in points if p["metric"] == metric), key=lambda p: p["pct"])
        container = _error_bars(
            axis, line, metric, number, linestyle=_STROKES[number // len(COLOURS) % 4]
        )
        for point in line:
            axis.annotate(
                share(point["pct"]),
                (100 * point["learned"].mean, 100 * point["kept"].mean),
                textcoords="offset points",
                xytext=_PLACES[number % len(_PLACES)],
                fontsize=7,
                color=container.lines[0].get_color(),
            )
    for number, point in enumerate(single, start=len(metrics)):
        _error_bars(axis, [point], point["label"], number, linestyle="none")
    earlier = "accuracy on task 1" if tasks == 2 else f"mean accuracy on tasks 1 to {tasks - 1}"
    axis.set_xlabel(f"learned: accuracy on task {tasks}, %")
    axis.set_ylabel(f"kept: {earlier}, %")
    bars = any(p[name].low is not None for p in [*points, *single] for name in _AXES)
    title = "Kept and learned" + ("; bars are 95% intervals over the seeds" if bars else "")
    axis.set_title(f"{title}\n{about}", fontsize=10)
    axis.grid(alpha=0.3)
    if count:
        figure.legend(fontsize=8, loc="outside right upper", ncols=columns)
    save_for_papers(figure, path)


def _error_bars(
    axis: Any, points: Sequence[Mapping[str, Any]], label: str, number: int, linestyle: str
) -> Any:
    across, up = (_bars([point[name] for point in points]) for name in _AXES)
    return axis.errorbar(
        [100 * point["learned"].mean for point in points],
        [100 * point["kept"].mean for point in points],
        xerr=across,
        yerr=up,
        color=COLOURS[number % len(COLOURS)],
        marker=_MARKERS[number % len(_MARKERS)],
        linestyle=linestyle,
        label=cut(label, _LABEL_SHOWN),
        capsize=2,
        elinewidth=0.7,
    )


def _bars(intervals: Sequence[Interval]) -> tuple[list[float], list[float]]:
    """Return how far the bars reach below and above the means; not at all without an interval."""
    below = [0.0 if i.low is None else 100 * max(0.0, i.mean - i.low) for i in intervals]
    above = [0.0 if i.high is None else 100 * max(0.0, i.high - i.mean) for i in intervals]
    return below, above
