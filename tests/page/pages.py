"""A page of made-up results, and a browser to look at it."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from permafrost.claims import all_claims, held_against
from permafrost.page import charts, content, gallery
from permafrost.stages.report import label

LAYERS = {"features.0": 6, "features.3": 80}
CLASSES = ("a cat", "<b>&amp; dog</b>")
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def made_rows(seeds=(0, 1, 2)):
    """Return rows of fine-tuning and of filters frozen by MSE and by chance."""
    draw = np.random.default_rng(0)
    rows = []
    for seed in seeds:
        for strategy, metric, pct, kept in (
            ("finetune", None, None, 0.3),
            ("freeze", "mse", 0.25, 0.4),
            ("freeze", "mse", 0.75, 0.5),
            ("freeze", "random", 0.25, 0.35),
            ("freeze", "random", 0.75, 0.45),
        ):
            kept += 0.02 * draw.random()
            learned = 0.9 - 0.3 * (pct or 0) + 0.02 * draw.random()
            row = {"strategy": strategy, "metric": metric, "pct": pct, "seed": seed, "hyper": {}}
            row |= {"twin": None, "head": "multi", "status": "done", "R": [[kept, learned]]}
            row |= {"forgetting": 0.6 - kept, "drift_live": 1 - kept}
            rows.append(row | {"acc_mean": (kept + learned) / 2, "label": label(row)})
    return rows


def made_gallery(size=(32, 32)):
    """Return a gallery of two layers, the second with more filters than are shown."""
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (20, 3, *size), dtype=np.uint8)
    layers = [
        gallery.layer_of_filters(
            name,
            draw.permutation(count).tolist(),
            draw.random((count, 2)),
            list(range(count // 2)),
            draw.standard_normal((count, 3, *size)),
            draw.integers(0, 20, (count, 4)),
            images,
            (np.full(3, 0.5), np.full(3, 0.25)),
        )
        for name, count in LAYERS.items()
    ]
    maps = draw.random((2, *size))
    classes = gallery.class_maps(images, np.arange(20) % 2, CLASSES, maps)
    return {"sides": size, "classes": classes, "layers": layers}


def made_page(folder: Path, **changed) -> Path:
    """Write a page."""
    rows = made_rows()
    figure = charts.trade_off(rows, 2)
    curves = [
        {"epoch": epoch, "accuracy": 0.5, "seed": seed, "task": str(task)}
        for seed in (0, 1)
        for task in (1, 2)
        for epoch in (1, 2, 3)
    ]
    frozen = {name: {"filters": n, "frozen": list(range(n // 2))} for name, n in LAYERS.items()}
    drift = {"drift": {name: {"frozen": 0.1, "live": None} for name in LAYERS}}
    table = "# Results\n\n| " + " | ".join("abcdefghijkl") + " |\n" + "| --- " * 12 + "|\n"
    parts = {
        "title": "made-up </script><script>throw 1</script>",
        "verdicts": content.verdicts({"multi": held_against(rows, all_claims(rows))}),
        "trade_offs": {"multi": figure},
        "seeds": 3,
        "tables": content.tables_as_html(table + "| " + " | ".join(["wide cell"] * 12) + " |\n"),
        "claims": content.tables_as_html("# Claims\n\n<b>no tag</b>"),
        "stability": "",
        "variant": "25% frozen, ranked by mse",
        "metric": "mse",
        "seed": 0,
        "made_by": [("torch", "2.0")],
        "settings": content.settings_as_text({"split": {"tasks": 2}}),
        "data": {
            "figures": {
                "trade-off-multi": figure,
                "epochs": charts.epochs(curves),
                "drift": charts.drift(list(LAYERS), [drift]),
                "forgetting": charts.forgetting(rows),
                "capacity": charts.capacity(list(LAYERS), frozen),
            },
            "gallery": made_gallery(),
            "downloads": content.downloads({"runs": rows}),
        },
    }
    path = folder / "index.html"
    path.write_text(content.render(**parts | changed))
    return path


def browser_path() -> str:
    """Return where a browser lies; without one the test is skipped, where CI put one it fails."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None and os.environ.get("PERMAFROST_BROWSER") == "required":
        pytest.fail("no browser, though one was to be installed")
    return found or pytest.skip("needs Chromium or Chrome")


@contextmanager
def opened(path: Path, *, width=1280, height=900, dark=False, tab=""):
    """Open a page in a browser; console errors and requests to any network fail the test."""
    from playwright.sync_api import sync_playwright

    executable = browser_path()
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(_FLAGS))
        page = browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
        )
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else 0)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: wrong.append(r.url) if r.url.startswith("http") else 0)
        page.goto(path.as_uri() + (f"#{tab}" if tab else ""))
        yield page
        browser.close()
    assert not wrong, wrong
