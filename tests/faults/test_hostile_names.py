"""Names that want to be markup, in pictures, in tables, in a whole run."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

from hostile_data import HOSTILE
from permafrost.evaluation import Interval
from permafrost.params import Params
from permafrost.pictures import draw_best_and_worst, draw_saliency
from permafrost.plots import draw_trade_off
from permafrost.ranking import Evidence
from permafrost.stages.report import tables
from permafrost.tables import escape, markdown
from project import Project
from small_data import put


@pytest.fixture
def no_mathtext(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("parsed as a formula")

    monkeypatch.setattr("matplotlib.mathtext.MathTextParser.parse", refuse)


def draw_all(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Draw every picture with names in it; return what was written."""
    draw = torch.Generator().manual_seed(0)
    maps = torch.rand(len(names), 8, 8, generator=draw)
    images = torch.zeros(len(names), 3, 8, 8, dtype=torch.uint8)
    evidence = Evidence(
        weights={"conv": torch.ones(2, 3, 3, 3)},
        filter_maps={"conv": torch.rand(2, 8, 8, generator=draw)},
        class_maps=maps,
    )
    half = {"kept": Interval(0.5, None, None), "learned": Interval(0.5, None, None)}
    points = [{"metric": name, "pct": 0.5} | half for name in names]
    draw_saliency(folder / "saliency.png", names, images, maps, maps, names[0])
    draw_best_and_worst(folder / "rank.png", names, evidence, "mse")
    single = [{"label": name} | half for name in names]
    draw_trade_off(folder / "trade_off.png", points, single, 2, names[0])
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


NAMES = ["rank.png", "saliency.png", "trade_off.pdf", "trade_off.png", "trade_off.svg"]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.usefixtures("no_mathtext")
def test_pictures_with_hostile_names(tally, tmp_path, rounds):
    chosen = [*HOSTILE[:5], "n" * 300] if rounds(0, 1) == 0 else HOSTILE
    with tally("hostile class names") as fault:
        for number, name in enumerate(chosen):
            with fault.trial(f"pictures with {name:.30}"):
                (tmp_path / str(number)).mkdir()
                pictures = draw_all(tmp_path / str(number), [name])
                assert sorted(pictures) == NAMES
                for name in (name for name in NAMES if name.endswith(".png")):
                    Image.open(BytesIO(pictures[name])).load()


def test_long_names_are_cut_in_pictures(tmp_path):
    one, other = (draw_best(tmp_path / f"{length}.png", "n" * length) for length in (50, 255))
    assert one == other
    assert draw_best(tmp_path / "short.png", "n" * 5) != one


def draw_best(path: Path, name: str) -> bytes:
    maps = torch.eye(8)[None]
    draw_saliency(path, [name], torch.zeros(1, 3, 8, 8, dtype=torch.uint8), maps, maps, "fullgrad")
    return path.read_bytes()


def shown(text: str) -> list[str]:
    """Return the texts that Markdown shows; markup within one is an error."""
    texts = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for part in token.children or []:
            assert part.type in ("text", "text_special"), (part.type, part.content)
        assert not token.type.startswith("html"), token.content
        if token.children:
            texts.append("".join(part.content for part in token.children))
    return texts


NAMES_IN_TABLES = [
    *HOSTILE,
    "a\nb",
    "<!-- x -->",
    "\\|",
    "*a*",
    "__init__",
    "_a_b_",
    "a_b",
    "~~x~~",
]


def test_tables_with_hostile_names(tally):
    with tally("hostile class names") as fault:
        for name in NAMES_IN_TABLES:
            with fault.trial(f"a table with {name:.30}"):
                seen = " ".join(name.split())
                assert shown(markdown([name, "b"], [["c", name]])) == [seen, "b", "c", seen]
        for name in filter(str.isprintable, NAMES_IN_TABLES):  # a profile's name has to be
            with fault.trial(f"a heading with {name:.30}"):
                params = Params(profile=name[:200])
                choices = {
                    "shared": {"freeze": {"chosen": {"pct": 0.5}, "trials": [], "at_edge": []}}
                }
                title = tables([], params, choices).partition("\n")[0]
                assert shown(title) == [f"Results: digits, profile {params.profile}"]


def test_plain_names_stay_readable():
    assert escape("linear_probe 25% (knows the task)") == "linear_probe 25% (knows the task)"
    assert escape("custom.centre_distance:centre_distance").count("_") == 2


def test_workflow_with_hostile_names(tally, tmp_path, rounds):
    """The whole workflow, by DVC, on an image folder of such classes."""
    if not rounds(0, 1):
        pytest.skip("takes a minute: in the long form only")
    with tally("hostile class names") as fault, fault.trial("dvc repro"):
        project = Project(tmp_path / "permafrost")
        names = [HOSTILE[0], "$(touch ran)", r"$\frac{", "a|b", "_x_", "n" * 255, "😀", "قطة"]
        random = np.random.RandomState(0)
        for name in names:
            for number in range(8):
                pixels = random.randint(256, size=(40, 36, 3)).astype(np.uint8)
                put(
                    project.folder / f"data/images/train/{name}/{number}.png",
                    Image.fromarray(pixels),
                )
        split = {"dataset": "image_folder", "root": "data/images", "classes_per_task": 4}
        project.change({"split": split | {"validation": 0.0}})
        project.change({"profile": "<script>alert('`|`')</script>"})
        project.run("dvc", "repro")
        assert not list(tmp_path.rglob("ran"))
        title = (project.folder / "reports/tables.md").read_text().partition("\n")[0]
        assert shown(title) == ["Results: image_folder, profile <script>alert('`|`')</script>"]
        for name in ("saliency/0.png", "rank/0.png", "kept_and_learned.png"):
            Image.open(project.folder / "reports" / name).load()
        assert project.runs() == project.expected_runs()
