"""What all figures of matplotlib share."""

import io
from pathlib import Path
from typing import Any

# Okabe & Ito, "Color universal design" (2008), but for black, which a dark page hides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any
) -> tuple[Any, Any]:
    """Return a figure of its own and its axes; a notebook's pyplot never hears of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def notebook_figure(rows: int, columns: int, *, figsize: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure that a notebook shows by itself, and its axes (rows, columns)."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A figure that knows its picture, with or without pyplot."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110)
            return buffer.getvalue()

    figure = NotebookFigure(figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_picture(axis: Any, picture: Any, title: str = "", **options: Any) -> None:
    """Draw a picture without ticks, its title small; options are those of ``imshow``."""
    import numpy as np

    axis.imshow(np.asarray(picture), **options)
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def save(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG."""
    from matplotlib.text import Text

    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar in a name is a dollar
    # Without the metadata the same picture is the same file.
    figure.savefig(path, dpi=dpi, metadata={"Software": None})


def save_for_papers(figure: Any, path: Path) -> None:
    """Write a figure as PNG with 300 dots an inch and, beside it, as SVG and PDF."""
    from matplotlib import rc_context

    save(figure, path, dpi=300)
    with rc_context({"svg.hashsalt": "permafrost", "pdf.fonttype": 42}):  # text stays text
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None, "Creator": None})


def cut(name: str, length: int) -> str:
    """Return a name that is not longer than so many characters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"
