"""The study's pieces: each is a set of parameters that the workflow takes, and resumes by seeds."""

import json

import pytest

from permafrost.names import check_names
from permafrost.params import Params
from study import __main__ as study


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "PROJECT", tmp_path)
    for number in range(12):
        (tmp_path / f"found/train/{number:02}").mkdir(parents=True)
    return tmp_path / "found"


@pytest.mark.parametrize("name", study.PIECES)
def test_parameters_are_valid_and_differ_by_seed(images, name):
    piece = study.PIECES[name]
    first, second = (study.parameters(piece, seed, study.visible(images, None)) for seed in (0, 1))
    for params, seed in ((first, 0), (second, 1)):
        read = Params.model_validate(params)
        assert (read.seeds, read.profile) == ([seed], "study")
        check_names(read, "params.yaml")
    drawn = isinstance(first["split"]["tasks"], list)
    assert drawn or first["split"]["selection"] == "random"
    assert (first["split"]["tasks"] != second["split"]["tasks"]) == drawn


def test_a_piece_that_chooses_does_not_see_the_test_images(images):
    (images / "test").mkdir()
    hidden = study.visible(images, "train")
    assert [path.name for path in hidden.iterdir()] == ["train"]
    assert (hidden / "train/00").is_dir()
    assert (study.visible(images, None) / "test").is_dir()


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(study, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(study, "PIECES", {"piece": {"seeds": [3, 4, 5], "changes": {}}})
    monkeypatch.setattr("sys.argv", ["study", "images", "piece"])

    def run(piece, seed, root):
        done.append(seed)
        if len(done) == 2:
            raise KeyboardInterrupt
        return [{"seed": seed, "acc_mean": 0.5}]

    monkeypatch.setattr(study, "run_piece", run)
    with pytest.raises(KeyboardInterrupt):
        study.main()
    assert [row["seed"] for row in study.read_rows("piece")] == [3]
    study.main()
    assert done == [3, 4, 4, 5]
    lines = (tmp_path / "rows/piece.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [3, 4, 5]
