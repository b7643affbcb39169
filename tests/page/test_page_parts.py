"""What the page is made of."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pages import made_gallery, made_rows
from permafrost.claims import all_claims, held_against
from permafrost.page import charts, content, gallery
from permafrost.params import Params
from permafrost.stages.report import labelled


def pixels(uri):
    head, data = uri.split(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_of_many_filters_the_best_the_worst_and_some_between_are_shown():
    assert gallery.chosen_places(5) == [0, 1, 2, 3, 4]
    places = gallery.chosen_places(512)
    assert len(places) == len(set(places)) == 64
    assert places == sorted(places)
    assert places[:21] == list(range(21))
    assert places[-21:] == list(range(491, 512))
    assert gallery.chosen_places(65) == sorted(set(gallery.chosen_places(65)))


def test_a_sprite_has_a_row_for_each_filter():
    tiles = np.zeros((3, 2, 3, 20, 10), np.uint8)
    tiles[1, 1, 0] = 255
    found = pixels(gallery.sprite(tiles)).astype(int)
    assert found.shape == (60, 20, 3)
    assert found[25:35, 12:18, 0].min() > 200
    assert found[:18].max() < 60


def test_large_images_are_reduced_each_by_itself():
    tiles = np.zeros((2, 1, 3, 96, 192), np.uint8)
    tiles[1] = 255
    found = pixels(gallery.sprite(tiles)).astype(int)
    assert found.shape == (48, 48, 3)
    assert found[:22].max() < 40
    assert found[26:].min() > 215


def test_filters_are_told_by_rank_with_what_became_of_them():
    _, layer = made_gallery()["layers"]
    assert (layer["filters"], layer["columns"], len(layer["shown"])) == (80, 5, 64)
    assert [each["rank"] for each in layer["shown"]][:2] == [1, 2]
    assert layer["shown"][-1]["rank"] == 80
    assert {each["filter"] for each in layer["shown"] if each["frozen"]} <= set(range(40))


def test_verdicts_are_of_explanations_against_chance():
    rows = made_rows()
    found = content.verdicts({"multi": held_against(rows, all_claims(rows))})
    assert [each["text"] for each in found] == [
        "Filters ranked by mse keep more than filters drawn by chance, head multi"
    ]
    assert found[0]["figure"].endswith("3 seeds")
    assert content.verdicts({"multi": []}) == []


def test_the_trade_off_has_a_line_for_each_ranking_and_points_for_seeds():
    figure = charts.trade_off(made_rows(), 2)
    named = [trace for trace in figure["data"] if trace.get("name")]
    assert [trace["name"] for trace in named] == ["ranked by mse", "ranked by random", "finetune"]
    assert [len(trace["x"]) for trace in named] == [2, 2, 1]
    assert named[0]["text"] == ["25%", "75%"]
    seeds = [trace for trace in figure["data"] if not trace.get("name")]
    assert [len(trace["x"]) for trace in seeds] == [6, 6, 3]
    styles = {(t["marker"]["color"], t["marker"]["symbol"]) for t in named}
    assert len(styles) == 3


def test_forgetting_is_drawn_against_drift_for_each_method_in_its_style():
    rows = [row | {"drift_live": 0.5, "forgetting": 0.25} for row in made_rows()]
    tuned = next(row for row in rows if row["strategy"] == "finetune")
    tuned["drift_live"] = None  # as of joint training
    figure = charts.forgetting(rows)
    assert [len(trace["x"]) for trace in figure["data"]] == [6, 6, 2]
    assert {(x, y) for t in figure["data"] for x, y in zip(t["x"], t["y"], strict=True)} == {
        (0.5, 25)
    }
    other = [trace for trace in charts.trade_off(rows, 2)["data"] if trace.get("name")]
    for one, trace in zip(other, figure["data"], strict=True):
        assert one["name"] == trace["name"]
        assert one["marker"]["color"] == trace["marker"]["color"]


def test_html_in_a_report_is_text_and_tables_scroll():
    made = content.tables_as_html("# Title\n\n| a |\n| --- |\n| <i>x</i> |\n")
    assert "<h2>Title</h2>" in made
    assert "&lt;i&gt;x&lt;/i&gt;" in made
    assert made.count('<div class="wide"><table>') == made.count("</table></div>") == 1


def test_downloads_have_every_column():
    (table,) = content.downloads({"runs": [{"a": 1, "b": [1, 2]}, {"c": None}]})
    assert table["columns"] == ["a", "b", "c"]
    assert table["rows"] == [{"a": 1, "b": [1, 2]}, {"c": None}]


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_one_seed_has_no_bars(seeds):
    figure = charts.trade_off(made_rows(seeds), 2)
    bars = [t["error_x"]["array"] for t in figure["data"] if t.get("name")]
    assert all(np.allclose(each, 0) == (len(seeds) == 1) for each in map(list, bars))


def test_both_lengths_of_joint_training_are_points_of_their_own():
    joint = {"strategy": "joint", "metric": None, "pct": None}
    rows = [
        row | joint | {"hyper": {"passes": passes}} for row in made_rows()[:1] for passes in (1, 2)
    ]
    rows += [
        row | {"strategy": "finetune", "hyper": {}, "seed": seed}
        for seed in (0, 1)
        for row in rows[:1]
    ]
    figure = charts.trade_off(labelled(rows, Params()), 2)
    assert [t["name"] for t in figure["data"] if t.get("name")] == [
        "joint, 10 epochs (1 seed)",
        "joint, 20 epochs (1 seed)",
        "finetune",
    ]


def test_of_very_many_classes_some_are_shown():
    maps, images = np.zeros((500, 8, 8)), np.zeros((500, 3, 8, 8), np.uint8)
    found = gallery.class_maps(images, np.arange(500), list(map(str, range(500))), maps)
    assert len(found["names"]) == len(found["counts"]) == 64
    assert pixels(found["maps"]).shape == (64 * 8, 8, 3)
