"""The page in a real browser: tabs, charts, gallery, downloads, two widths, both themes."""

import csv
import io
from pathlib import Path

import pytest

from pages import CLASSES, LAYERS, made_page, made_rows, opened

TABS = ("result", "tables", "claims", "curves", "gallery", "run")
SIZES = {"laptop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return made_page(tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_tab_fits_and_draws(path, size, dark):
    width, height = SIZES[size]
    with opened(path, width=width, height=height, dark=dark) as page:
        for tab in TABS:
            page.click(f"#tab-{tab}")
            shown = page.locator("main > section:visible")
            assert shown.count() == 1
            assert shown.get_attribute("id") == f"part-{tab}"
            assert page.get_attribute(f"#tab-{tab}", "aria-selected") == "true"
            charts = page.locator(f"#part-{tab} .chart")
            assert charts.count() == {"result": 1, "curves": 4}.get(tab, 0)
            drawn = page.locator(f"#part-{tab} .chart:has(svg.main-svg)")
            assert drawn.count() == charts.count()
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.evaluate(wide) <= 0, f"{tab} is wider than the window"
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") != dark


def test_the_address_names_the_tab_and_arrows_go_on(path):
    with opened(path, tab="gallery") as page:
        assert page.is_visible("#part-gallery")
        assert page.evaluate("scrollY") == 0
        page.focus("#tab-gallery")
        page.keyboard.press("ArrowRight")
        assert page.is_visible("#part-run")
        assert page.url.endswith("#run")
    with opened(path, tab="nothing-of-it") as page:
        assert page.is_visible("#part-result")


def test_the_gallery_by_mouse_and_by_keyboard(path):
    with opened(path, tab="gallery") as page:
        names = page.locator("#classes .row b").all_text_contents()
        assert tuple(names) == CLASSES
        assert page.locator("#filters button").count() == LAYERS["features.0"]
        page.click("#layers button:nth-child(2)")
        assert page.locator("#filters button").count() == 64
        page.hover("#filters button:nth-child(3)")
        assert "rank\n3 of 80" in page.inner_text("#detail")
        page.click("#filters button:nth-child(64)")
        assert "rank\n80 of 80" in page.inner_text("#detail")
        page.keyboard.press("ArrowLeft")
        assert "rank\n79 of 80" in page.inner_text("#detail")
        assert page.locator("#detail .tile").count() == 5
        page.fill("#opacity", "25")
        tops = page.locator(".over .tile:nth-child(2)")
        assert tops.first.evaluate("e => getComputedStyle(e).opacity") == "0.25"


def test_numbers_can_be_taken_away(path):
    with opened(path, tab="run") as page:
        with page.expect_download() as download:
            page.click("text=runs.csv")
        text = Path(download.value.path()).read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(made_rows())
    assert [row["metric"] for row in rows[:2]] == ["", "mse"]
    assert float(rows[1]["acc_mean"]) == made_rows()[1]["acc_mean"]


def test_names_are_text_and_no_code(path):
    """The title and a class hold tags; nothing of them runs, or `opened` would tell."""
    with opened(path) as page:
        assert "</script>" in page.inner_text("h1")
        page.click("#tab-claims")
        assert "<b>no tag</b>" in page.inner_text("#part-claims")


@pytest.mark.parametrize(
    "part", ["<script>throw 1</script>", "<img src='http://localhost:9/x.png'>"]
)
def test_an_error_or_a_request_would_be_seen(tmp_path, part):
    path = tmp_path / "index.html"
    path.write_text(f"<!doctype html><title>x</title>{part}")
    with pytest.raises(AssertionError), opened(path) as page:
        page.wait_for_timeout(200)
