"""What code a result can have come from: both directions, on copies of the sources."""

import pytest

from permafrost.source import PACKAGE_SOURCES, foreign, reach_digest, reached, read_sources

FURTHER = "permafrost.runs.further_tasks"
FIRST = "permafrost.runs.first_task"
VGG = "permafrost.models.vgg"


def strategy(name):
    return f"permafrost.strategies.{name}"


def digest_after(edits, *roots):
    """Hash what roots reach once texts were put behind the modules' own."""
    sources = {name: text + edits.get(name, "") for name, text in PACKAGE_SOURCES.items()}
    assert set(edits) <= set(sources)
    return reach_digest(roots, sources)


CODE = "\n\ndef added() -> int:\n    return 1\n"


@pytest.mark.parametrize(
    "edited",
    [
        "permafrost.training.loop",
        "permafrost.strategies.learner",
        "permafrost.strategies.ewc",
        "permafrost.strategies.quadratic",
        "permafrost.strategies.fisher",
        "permafrost.data.batches",
        "permafrost.models.vgg",
        "permafrost.models.networks",
        "permafrost.evaluation.accuracy",
        "permafrost.seeding",
    ],
)
def test_what_a_run_reaches_changes_its_hash(edited):
    roots = (FURTHER, strategy("ewc"), VGG)
    assert digest_after({edited: CODE}, *roots) != digest_after({}, *roots)


@pytest.mark.parametrize(
    "edited",
    [
        "permafrost.models.torchvision_networks",
        "permafrost.strategies.lwf",
        "permafrost.strategies.si",
        "permafrost.strategies.joint",
        "permafrost.strategies.freeze",
        "permafrost.strategies.",
        "permafrost.explain.fullgrad",
        "permafrost.ranking.map_metrics",
        "permafrost.runs.rows",
        "permafrost.evaluation.measures",
        "permafrost.tables",
        "permafrost.pictures",
        "permafrost.params",
        "permafrost.cli",
        "permafrost.tracking.tracker",
        "permafrost.stages.sweep",
    ],
)
def test_what_a_run_does_not_reach_leaves_its_hash(edited):
    roots = (FURTHER, strategy("ewc"), VGG)
    assert digest_after({edited: CODE}, *roots) == digest_after({}, *roots)


@pytest.mark.parametrize("edited", ["si", "ewc", "joint", "lwf"])
def test_no_strategy_is_part_of_the_first_task(edited):
    assert digest_after({strategy(edited): CODE}, FIRST) == digest_after({}, FIRST)


def test_docstrings_and_comments_do_not_count():
    edits = dict.fromkeys(PACKAGE_SOURCES, '\n# a comment\n\n"""A text that nothing reads."""\n')
    assert digest_after(edits, FURTHER) == digest_after({}, FURTHER)


SOURCES = {
    "own.": "from own.deep import thing as alias\nhere = 1\n",
    "own.deep": "import json\nfrom . import sibling\nthing = 1\n",
    "own.sibling": "import numpy.linalg\n",
    "own.lazy": "def run():\n    from own import alias\n",
    "own.typed": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import own.deep\n",
    "own.whole": "import own\n",
    "own.of_init": "from own import here\n",
    "own.star": "from own.sibling import *\n",
    "own.ring": "import own.ring\nfrom own.star import x\n",
}


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("own.deep", {"own.deep", "own.sibling"}),
        ("own.lazy", {"own.lazy", "own.deep", "own.sibling"}),
        ("own.typed", {"own.typed"}),
        ("own.whole", {"own.whole", "own.", "own.deep", "own.sibling"}),
        ("own.of_init", {"own.of_init", "own.", "own.deep", "own.sibling"}),
        ("own.star", {"own.star", "own.sibling"}),
        ("own.ring", {"own.ring", "own.star", "own.sibling"}),
        ("elsewhere", set()),
    ],
)
def test_imports_are_followed_by_name(root, expected):
    assert reached([root], SOURCES) == expected


def test_what_comes_from_elsewhere_is_told():
    assert foreign(reached(["own.deep"], SOURCES), SOURCES) == {"json", "numpy"}


def test_sources_are_named_as_modules(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/__init__.py").write_text("")
    (tmp_path / "inner/part.py").write_text("x = 1\n")
    (tmp_path / ".#part.py").symlink_to("nowhere")  # as editors leave
    assert read_sources(tmp_path, "own") == {"own.inner.": "", "own.inner.part": "x = 1\n"}
    assert read_sources(tmp_path / "missing", "own") == {}
