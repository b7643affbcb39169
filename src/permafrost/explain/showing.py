"""Figures for notebooks: an image under its map, filters side by side.

They are matplotlib's ``Figure``, which a notebook shows by itself; pyplot and its backend never
hear of them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from permafrost.figures import notebook_figure, show_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(image: Tensor, saliency: Tensor, *, title: str = "", opacity: float = 0.6) -> "Figure":
    """Show an image, its saliency map, and the map over the image.

    Parameters
    ----------
    image
        (3, H, W) of any range, such as a normalised one: it is stretched to its own.
    saliency
        (H, W), of any range.
    title
        Above.
    opacity
        Of the map over the image, 0..1.

    Returns
    -------
    Figure
        Of matplotlib.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.shape[1:] != saliency.shape:
        shapes = f"{tuple(image.shape)} and {tuple(saliency.shape)}"
        raise ValueError(f"image must be (3, H, W) and saliency (H, W), not {shapes}")
    picture, heat = _stretched(image).permute(1, 2, 0).numpy(), _stretched(saliency).numpy()
    figure, axes = notebook_figure(1, 3, figsize=(7.5, 2.8))
    first, second, third = axes.flat
    show_picture(first, picture, "image")
    show_picture(second, heat, "map", cmap="magma")
    show_picture(third, picture.mean(-1), "map over image", cmap="gray", vmin=0, vmax=1)
    third.imshow(heat, cmap="magma", alpha=opacity)
    figure.suptitle(title)
    return figure


def show_filters(
    pictures: Tensor, titles: Sequence[str] | None = None, *, columns: int = 8
) -> "Figure":
    """Show pictures of filters side by side, each stretched to its own range.

    Parameters
    ----------
    pictures
        (F, 3, H, W), as `visualize_filters` gives them.
    titles
        F of them; by default the places, from 0.
    columns
        In a row.

    Returns
    -------
    Figure
        Of matplotlib.

    Raises
    ------
    ValueError
        If there are no pictures, or not as many titles.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not len(pictures):
        raise ValueError(f"pictures must be (F, 3, H, W), not {tuple(pictures.shape)}")
    names = list(map(str, range(len(pictures)))) if titles is None else list(titles)
    if len(names) != len(pictures):
        raise ValueError(f"{len(names)} titles for {len(pictures)} pictures")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = notebook_figure(rows, columns, figsize=(1.3 * columns, 1.5 * rows))
    for axis in axes.flat[len(pictures) :]:
        axis.axis("off")
    for axis, picture, name in zip(axes.flat, pictures, names, strict=False):
        show_picture(axis, _stretched(picture).permute(1, 2, 0).numpy(), name)
    return figure


def _stretched(values: Tensor) -> Tensor:
    """Return values stretched to 0..1, on the CPU; equal ones become 0."""
    plain = values.detach().float().cpu()
    low, high = plain.amin(), plain.amax()
    return (plain - low) / (high - low if high > low else 1)
