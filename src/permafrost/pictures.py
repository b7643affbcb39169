"""Pictures: what the network looks at, what its filters look for, what is kept and learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permafrost.data import Normalization
from permafrost.evaluation import Interval, share
from permafrost.ranking import Evidence, order_filters, score_filters

_FILTERS_SHOWN = 4
_MOSAIC_COLUMNS = 32
_NAME_SHOWN = 18  # characters of a class, about as wide as its map
_LABEL_SHOWN = 40  # characters of a line's name, which is beside the plot
_MARKERS = "os^DvP*X<>"  # as many as colours; each round of ten pairs them differently
_STROKES = ("-", "--", ":", "-.")
_LEGEND_ROWS = 26
_AXES = ("learned", "kept")


def _subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any
) -> tuple[Any, Any]:
    """Return a figure of its own and its axes; a notebook's pyplot never hears of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _save(figure: Any, path: Path) -> None:
    from matplotlib.text import Text

    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar in a name is a dollar
    # Without the metadata the same picture is the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _show(axis: Any, image: Tensor, title: str = "", **options: Any) -> None:
    axis.imshow(image.numpy(), **options)
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _class_title(name: str) -> str:
    short = _cut(name, _NAME_SHOWN)
    separator = "\n" if len(short) > 10 else " "
    return f"class map:{separator}{short}"


def draw_saliency(
    path: Path,
    classes: Sequence[str],
    images: Tensor,
    maps: Tensor,
    class_maps: Tensor,
    method: str,
) -> None:
    """Draw each class's map beside example images under their own maps.

    Parameters
    ----------
    path : Path
        The picture to write.
    classes : sequence of str
        The C names.
    images : Tensor of uint8, shape (C * E, 3, H, W)
        E examples of each class, class by class.
    maps : Tensor, shape (C * E, H, W)
        Their saliency maps.
    class_maps : Tensor, shape (C, H, W)
        The classes' maps.
    method : str
        What made the maps.
    """
    examples = len(images) // len(classes)
    figure, axes = _subplots(
        len(classes),
        1 + 2 * examples,
        figsize=(1.2 * (1 + 2 * examples), 1.35 * len(classes)),
        squeeze=False,
    )
    for row, name in enumerate(classes):
        _show(axes[row][0], class_maps[row], _class_title(name), cmap="magma")
        for column in range(examples):
            index = row * examples + column
            picture = images[index].permute(1, 2, 0)
            _show(axes[row][1 + 2 * column], picture)
            _show(axes[row][2 + 2 * column], picture.float().mean(-1), cmap="gray")
            axes[row][2 + 2 * column].imshow(maps[index].numpy(), cmap="magma", alpha=0.65)
    figure.suptitle(f"What the network looks at, by {method}", fontsize=10)
    _save(figure, path)


def draw_filters(
    folder: Path, pictures: Mapping[str, Tensor], normalization: Normalization
) -> None:
    """Draw every filter's picture, a mosaic for each layer, in the filters' order.

    Parameters
    ----------
    folder : Path
        Gets ``LAYER.png`` for each layer.
    pictures : mapping of str to Tensor, shape (F, 3, H, W)
        In normalised units.
    normalization : Normalization
        To turn them back into colours; what lies outside 0..1 is clipped.
    """
    from torchvision.utils import make_grid, save_image

    folder.mkdir(parents=True, exist_ok=True)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (normalization.mean, normalization.std)
    )
    for position, (name, values) in enumerate(pictures.items()):
        colours = (values.cpu() * std + mean).clamp(0, 1)
        mosaic = make_grid(colours, nrow=min(_MOSAIC_COLUMNS, len(colours)), padding=1)
        save_image(mosaic, folder / f"{position:02d}_{name}.png")


def draw_best_and_worst(
    path: Path, classes: Sequence[str], evidence: Evidence, metric: str
) -> None:
    """Draw the best and the worst filters of each class beside its map, in the middle layer.

    Parameters
    ----------
    path : Path
        The picture to write.
    classes : sequence of str
        The C names.
    evidence : Evidence
        Filter and class maps.
    metric : str
        The map metric that compares them.
    """
    assert evidence.class_maps is not None
    layer = list(evidence.weights)[len(evidence.weights) // 2]
    one_layer = Evidence(
        weights={layer: evidence.weights[layer]},
        filter_maps={layer: evidence.filter_maps[layer]},
        class_maps=evidence.class_maps,
        seed=evidence.seed,
    )
    scores = score_filters(metric, one_layer)[layer]
    shown = min(_FILTERS_SHOWN, len(scores))
    figure, axes = _subplots(
        len(classes),
        1 + 2 * shown,
        figsize=(1.2 * (1 + 2 * shown), 1.4 * len(classes)),
        squeeze=False,
    )
    for row, name in enumerate(classes):
        _show(axes[row][0], evidence.class_maps[row], _class_title(name), cmap="magma")
        own = scores[:, row : row + 1]
        order = order_filters(own).tolist()
        for column, index in enumerate(order[:shown] + order[-shown:]):
            rank = "best" if column < shown else "worst"
            title = f"{rank}: filter {index}\n{metric} {abs(float(own[index, 0])):.3f}"
            _show(axes[row][1 + column], evidence.filter_maps[layer][index], title, cmap="magma")
    figure.suptitle(f"Filters of layer {layer} beside the class maps, by {metric}", fontsize=10)
    _save(figure, path)


def draw_trade_off(
    path: Path,
    points: Sequence[Mapping[str, Any]],
    single: Sequence[Mapping[str, Any]],
    tasks: int,
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
    """
    metrics = list(dict.fromkeys(point["metric"] for point in points))
    count = len(metrics) + len(single)
    columns = -(-count // _LEGEND_ROWS)  # one more for every so many lines
    figure, axis = _subplots(figsize=(6.5 + 2.5 * columns, 5.5))
    for number, metric in enumerate(metrics):
        line = sorted((p for p in points if p["metric"] == metric), key=lambda p: p["pct"])
        container = _error_bars(axis, line, metric, number, linestyle=_STROKES[number // 10 % 4])
        for point in line:
            axis.annotate(
                share(point["pct"]),
                (100 * point["learned"].mean, 100 * point["kept"].mean),
                textcoords="offset points",
                xytext=(4, 4),
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
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    if count:
        figure.legend(fontsize=8, loc="outside right upper", ncols=columns)
    _save(figure, path)


def _error_bars(
    axis: Any, points: Sequence[Mapping[str, Any]], label: str, number: int, linestyle: str
) -> Any:
    across, up = (_bars([point[name] for point in points]) for name in _AXES)
    return axis.errorbar(
        [100 * point["learned"].mean for point in points],
        [100 * point["kept"].mean for point in points],
        xerr=across,
        yerr=up,
        color=f"C{number % 10}",
        marker=_MARKERS[(number + number // 10) % 10],
        linestyle=linestyle,
        label=_cut(label, _LABEL_SHOWN),
        capsize=2,
        elinewidth=0.7,
    )


def _bars(intervals: Sequence[Interval]) -> tuple[list[float], list[float]]:
    """Return how far the bars reach below and above the means; not at all without an interval."""
    below = [0.0 if i.low is None else 100 * max(0.0, i.mean - i.low) for i in intervals]
    above = [0.0 if i.high is None else 100 * max(0.0, i.high - i.mean) for i in intervals]
    return below, above
