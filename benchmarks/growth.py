"""`python -m benchmarks.growth`: how the cost grows with width, image size and classes."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import jobs
from permafrost.explain import conv_layers, start_image, visualize_filters

WIDTHS, SIZES, CLASSES = (0.25, 0.5, 1.0), (32, 64, 128), (10, 20, 50)
FILTERS = 8  # of each layer are visualised, for one step
NUMBERS = Path(__file__).parent / "growth.json"
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "cost.png"


def main() -> None:
    """Measure, write benchmarks/growth.json and draw docs/pictures/cost.png."""
    torch.set_num_threads(2)
    rows = [
        *(_row("training", w, s, None, _training(w, s)) for w, s in _pairs(WIDTHS, SIZES)),
        *(_row("visualisation", w, s, None, _pictures(w, s)) for w, s in _pairs(WIDTHS, SIZES)),
        *(_row("ranking", w, 32, 10, _ranking(w, 32, 10)) for w in WIDTHS[:-1]),
        *(_row("ranking", 1.0, s, c, _ranking(1.0, s, c)) for s, c in _pairs(SIZES, CLASSES)),
    ]
    NUMBERS.write_text(json.dumps(rows, indent=1) + "\n")
    _draw(rows)


def _pairs(left: tuple[float, ...], right: tuple[int, ...]) -> list[tuple[float, int]]:
    return list(itertools.product(left, right))  # type: ignore[arg-type]


def _row(job: str, width: float, size: float, classes: int | None, ms: float) -> dict[str, object]:
    row = {"job": job, "width": width, "pixels": size, "classes": classes, "ms": round(ms, 3)}
    print(row)
    return row


def _training(width: float, size: int) -> float:
    """Return milliseconds of an image in a first-task step of 64."""
    step = jobs.our_step(0.0, "float32", torch.device("cpu"), width, size)
    return _milliseconds(step) / jobs.BATCH


def _pictures(width: float, size: int) -> float:
    """Return milliseconds of a step of one filter, the mean over all filters of the network."""
    model = jobs.network(width).view("shared", 0, 1).eval()
    start, layers = start_image(size, jobs.MEAN, jobs.STD, 0), conv_layers(model)
    total = 0.0
    for name, layer in layers.items():
        filters = range(min(FILTERS, layer.out_channels))
        ms = _milliseconds(
            lambda n=name, f=filters: visualize_filters(model, n, f, start=start, steps=2)
        )
        total += ms / 2 / len(filters) * layer.out_channels
    return total / sum(layer.out_channels for layer in layers.values())


def _ranking(width: float, size: float, classes: int) -> float:
    """Return milliseconds of all metrics of all filters and classes."""
    side = int(size)
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.rand(layer.out_channels, side, side, generator=generator)
        for layer in conv_layers(jobs.network(width)).values()
    ]
    class_maps = torch.rand(classes, side, side, generator=generator)

    return _milliseconds(lambda: jobs.rank(maps, class_maps))


def _milliseconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Return the least of some rounds after a first; of work of over 5 seconds the first alone."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
        if times[0] > 5000:
            return times[0]
    return min(times[1:])


def _draw(rows: list[dict[str, object]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("training", "width", "×{:g} width", "training, ms an image"),
        ("visualisation", "width", "×{:g} width", "visualisation, ms a filter and step"),
        ("ranking", "classes", "{:g} classes", "ranking by 7 metrics, s, full width"),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    for axis, (job, by, label, title) in zip(axes, panels, strict=True):
        ranked = job == "ranking"
        shown = [r for r in rows if r["job"] == job and (not ranked or r["width"] == 1.0)]
        for value in sorted({r[by] for r in shown}):  # type: ignore[type-var]
            line = [(r["pixels"], r["ms"]) for r in shown if r[by] == value]
            sizes, times = zip(*line, strict=True)
            scale = 1000 if ranked else 1
            axis.plot(sizes, [t / scale for t in times], "o-", label=label.format(value))
        axis.set(xscale="log", yscale="log", title=title, xlabel="side of the image, pixels")
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
