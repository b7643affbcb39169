"""The page's gallery: class maps over images, and filters with what they answer to."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]

# Pixels of a thumbnail's side, filters of a layer, examples of a class: at most.
_SIDE, _FILTERS, _EXAMPLES = 48, 64, 6


def chosen_places(count: int, most: int = _FILTERS) -> list[int]:
    """Return the places of so many that are shown: the first, the last, a stride between."""
    if count <= most:
        return list(range(count))
    ends = most // 3
    between = np.linspace(ends, count - ends - 1, most - 2 * ends).round().astype(int).tolist()
    return [*range(ends), *between, *range(count - ends, count)]


def layer_of_filters(
    name: str,
    order: Sequence[int],
    scores: Array,
    frozen: Sequence[int],
    pictures: Array,
    strongest: Array,
    images: Array,
    normalization: tuple[Array, Array],
) -> dict[str, Any]:
    """Return a layer's filters by rank, and a sprite with a row for each.

    Parameters
    ----------
    name : str
        The layer's.
    order : sequence of int
        Its filters, the best first.
    scores : array, shape (F, C)
        A filter's is shown as its mean over the classes.
    frozen : sequence of int
        Which filters stay.
    pictures : array, shape (F, 3, H, W)
        What each filter looks for, in normalised units.
    strongest : array of int64, shape (F, K)
        Which images each filter answers to most.
    images : array of uint8, shape (N, 3, H, W)
        These images.
    normalization : (array, array), shape (3,) each
        Mean and standard deviation of the pictures' units.
    """
    places = chosen_places(len(order))
    shown = [order[place] for place in places]
    mean, std = (np.reshape(values, (3, 1, 1)) for values in normalization)
    colours = np.clip(pictures[shown] * std + mean, 0, 1) * 255
    seen = images[strongest[shown]]  # (F, K, 3, H, W)
    tiles = np.concatenate([colours.round().astype(np.uint8)[:, None], seen], axis=1)
    held = set(frozen)
    return {
        "layer": name,
        "filters": len(order),
        "columns": tiles.shape[1],
        "sprite": sprite(tiles),
        "shown": [
            {
                "filter": index,
                "rank": place + 1,
                "score": float(f"{float(scores[index].mean()):.4g}"),
                "frozen": index in held,
            }
            for place, index in zip(places, shown, strict=True)
        ],
    }


def class_maps(images: Array, labels: Array, names: Sequence[str], maps: Array) -> dict[str, Any]:
    """Return examples of classes and each class's map, to be laid over them; of many classes some.

    Parameters
    ----------
    images, labels : array, shape (N, 3, H, W) and (N,)
        Of the first task, uint8 and int64.
    names : sequence of str
        Of the C classes.
    maps : array, shape (C, H, W)
        0..1.
    """
    from matplotlib import colormaps

    shown = chosen_places(len(names))
    examples = [np.flatnonzero(labels == label)[:_EXAMPLES] for label in shown]
    columns = max(map(len, examples))
    tiles = np.zeros((len(shown), columns, *images.shape[1:]), np.uint8)
    for row, places in enumerate(examples):
        tiles[row, : len(places)] = images[places]
    heat = colormaps["magma"](maps[shown], bytes=True)[..., :3]  # (C, H, W, 3)
    return {
        "names": [names[label] for label in shown],
        "columns": columns,
        "counts": [len(places) for places in examples],
        "images": sprite(tiles),
        "maps": sprite(heat.transpose(0, 3, 1, 2)[:, None]),
    }


def sprite(tiles: Array) -> str:
    """Return tiles (R, K, 3, H, W), uint8, as one picture of R rows, in a data URI.

    WebP holds photographs and maps in a tenth of PNG's bytes.
    """
    rows, columns, _, height, width = tiles.shape
    factor = _SIDE / max(height, width)
    if factor < 1:
        picture = _reduced(tiles, *(max(1, round(side * factor)) for side in (height, width)))
    else:
        whole = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
        picture = Image.fromarray(np.ascontiguousarray(whole))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _reduced(tiles: Array, height: int, width: int) -> Image.Image:
    """Return tiles side by side, each reduced by itself: none takes of its neighbour's."""
    whole = Image.new("RGB", (tiles.shape[1] * width, tiles.shape[0] * height))
    for row, column in np.ndindex(*tiles.shape[:2]):
        tile = Image.fromarray(np.ascontiguousarray(tiles[row, column].transpose(1, 2, 0)))
        whole.paste(tile.resize((width, height)), (column * width, row * height))
    return whole
