"""Where a run of the whole workflow stands."""

import pytest

from permafrost import schedule


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(schedule, "project_root", lambda: tmp_path)
    (tmp_path / "params.yaml").write_text("seeds: [0]\n")
    return tmp_path


def test_each_stage_is_told_with_what_is_left(project):
    schedule.note_schedule({"split@0": 20.0, "sweep": 130.0, "page": 50.0})
    told = [schedule.place(stage) for stage in ("split@0", "sweep", "page")]
    assert [line.split(" left")[0] for line in told] == [
        "stage 1 of 3, about 3 minutes",
        "stage 2 of 3, about 3 minutes",
        "stage 3 of 3, about 50 seconds",
    ]


@pytest.mark.parametrize(
    ("stage", "file", "text"),
    [
        ("rank@0", None, None),
        ("page", "params.yaml", "seeds: [1]\n"),
        ("page", ".permafrost/schedule.json", "[]"),
        ("page", ".permafrost/schedule.json", "{"),
        ("page", ".permafrost/schedule.json", '{"parameters": "", "stages": []}'),
    ],
)
def test_nothing_is_told_that_is_not_known(project, stage, file, text):
    assert schedule.place("page") is None
    schedule.note_schedule({"page": 1.0})
    assert schedule.place("page")
    if file:
        (project / file).write_text(text)
    assert schedule.place(stage) is None
