"""Pictures: what the network looks at, what its filters look for, what is kept and learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permafrost.data import Normalization
from permafrost.ranking import Evidence, order_filters, score_filters

_FILTERS_SHOWN = 4
_MOSAIC_COLUMNS = 32
_NAME_SHOWN = 18  # characters of a class, about as wide as its map


def _subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any
) -> tuple[Any, Any]:
    """Return a figure of its own and its axes; a notebook's pyplot never hears of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the metadata the same picture is the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _show(axis: Any, image: Tensor, title: str = "", **options: Any) -> None:
    axis.imshow(image.numpy(), **options)
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def _class_title(name: str) -> str:
    short = name if len(name) <= _NAME_SHOWN else f"{name[: _NAME_SHOWN - 1]}…"
    separator = "\n" if len(short) > 10 else " "
    return "class map:" + separator + short.replace("$", r"\$")  # a dollar, and no formula


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
    path: Path, points: Sequence[Mapping[str, Any]], single: Sequence[Mapping[str, Any]]
) -> None:
    """Draw accuracy on task 1 against task 2 along pct, one line for each metric.

    Parameters
    ----------
    path : Path
        The picture to write.
    points : sequence of mapping
        ``metric``, ``pct`` and the intervals ``acc_task1`` and ``acc_task2``.
    single : sequence of mapping
        Other strategies: ``label`` and the two intervals.
    """
    figure, axis = _subplots(figsize=(7, 5))
    for metric in dict.fromkeys(point["metric"] for point in points):
        line = sorted((p for p in points if p["metric"] == metric), key=lambda p: p["pct"])
        container = _error_bars(axis, line, metric, "o-")
        for point in line:
            axis.annotate(
                f"{point['pct']:.0%}",
                (100 * point["acc_task2"].mean, 100 * point["acc_task1"].mean),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
                color=container.lines[0].get_color(),
            )
    for marker, point in zip("s^DvP*X<>hp8d", single, strict=False):
        _error_bars(axis, [point], point["label"], marker)
    axis.set_xlabel("learned: accuracy on task 2, %")
    axis.set_ylabel("kept: accuracy on task 1, %")
    axis.set_title("Kept and learned; bars are 95% intervals over the seeds", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def _error_bars(axis: Any, points: Sequence[Mapping[str, Any]], label: str, style: str) -> Any:
    def bars(name: str) -> list[float]:
        return [100 * (p[name].mean - (p[name].low or p[name].mean)) for p in points]

    return axis.errorbar(
        [100 * point["acc_task2"].mean for point in points],
        [100 * point["acc_task1"].mean for point in points],
        xerr=bars("acc_task2"),
        yerr=bars("acc_task1"),
        fmt=style,
        label=label,
        capsize=2,
        elinewidth=0.7,
    )
