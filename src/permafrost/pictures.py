"""Pictures: what the network looks at, what its filters look for."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from permafrost.data import Normalization
from permafrost.figures import cut, save, show_picture, subplots
from permafrost.ranking import Evidence, order_filters, score_filters

_FILTERS_SHOWN = 4
_MOSAIC_COLUMNS = 32
_NAME_SHOWN = 18  # characters of a class, about as wide as its map


def _class_title(name: str) -> str:
    short = cut(name, _NAME_SHOWN)
    separator = "\n" if len(short) > 8 else " "
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
    figure, axes = subplots(
        len(classes),
        1 + 2 * examples,
        figsize=(1.2 * (1 + 2 * examples), 1.35 * len(classes)),
        squeeze=False,
    )
    for row, name in enumerate(classes):
        show_picture(axes[row][0], class_maps[row], _class_title(name), cmap="magma")
        for column in range(examples):
            index = row * examples + column
            picture = images[index].permute(1, 2, 0)
            show_picture(axes[row][1 + 2 * column], picture)
            show_picture(axes[row][2 + 2 * column], picture.float().mean(-1), cmap="gray")
            axes[row][2 + 2 * column].imshow(maps[index].numpy(), cmap="magma", alpha=0.65)
    figure.suptitle(f"What the network looks at, by {method}", fontsize=10)
    save(figure, path)


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
    figure, axes = subplots(
        len(classes),
        1 + 2 * shown,
        figsize=(1.2 * (1 + 2 * shown), 1.4 * len(classes)),
        squeeze=False,
    )
    for row, name in enumerate(classes):
        show_picture(axes[row][0], evidence.class_maps[row], _class_title(name), cmap="magma")
        own = scores[:, row : row + 1]
        order = order_filters(own).tolist()
        for column, index in enumerate(order[:shown] + order[-shown:]):
            rank = "best" if column < shown else "worst"
            title = f"{rank}: filter {index}\n{metric} {abs(float(own[index, 0])):.3f}"
            show_picture(
                axes[row][1 + column], evidence.filter_maps[layer][index], title, cmap="magma"
            )
    figure.suptitle(f"Filters of layer {layer} beside the class maps, by {metric}", fontsize=10)
    save(figure, path)
