"""The study's pieces: each is a set of parameters that the workflow takes, and resumes by seeds."""

import json
import shutil
import sys
from collections import Counter

import pytest
import torch
import yaml
from PIL import Image

from permafrost import claims
from permafrost.data.image_folder import list_images
from permafrost.evaluation.comparisons import Difference
from permafrost.names import check_names
from permafrost.params import Params
from permafrost.plan import grids, heads, sweep_runs
from permafrost.ranking import Evidence
from permafrost.ranking.weights import random
from permafrost.strategies.packnet import PackNet
from study import __main__ as study
from study import choosing, draws, findings, forest

TUNED = [
    {"strategy": "lwf", "seed": seed, "status": "done", "parameters": "", "acc_mean": accuracy,
     "hyper": {"weight": weight, "temperature": 2}}
    for seed in (0, 1) for weight, accuracy in ((1, 0.4), (3, 0.5), (10, 0.45))
]  # fmt: skip
TUNING = [name for name, piece in study.PIECES.items() if piece.get("target") == "tune"]


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "PROJECT", tmp_path / "project")
    monkeypatch.setattr(study, "ROWS", tmp_path / "rows")
    for name in TUNING:
        study.write_rows(name, TUNED)
    for part in ("train", "test"):
        for number in range(12):
            folder = tmp_path / f"found/{part}/{number:02}"
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "0.png")
    (tmp_path / "found/train/.DS_Store").touch()
    return tmp_path / "found"


@pytest.mark.parametrize("name", study.PIECES)
def test_parameters_are_valid_and_differ_by_seed(images, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "custom.draws", draws)  # the project's, when it is made
    piece = study.PIECES[name]
    first, second = (study.parameters(piece, seed, images) for seed in (0, 1))
    for params, seed in ((first, 0), (second, 1)):
        read = Params.model_validate(params)
        assert (read.seeds, read.profile) == ([seed], "study")
        check_names(read, "params.yaml")
    drawn = isinstance(first["split"]["tasks"], list)
    assert drawn or first["split"]["selection"] == "random"
    assert (first["split"]["tasks"] != second["split"]["tasks"]) == drawn
    if "tuned" in piece:
        assert first["tune"]["lwf"] == [{"weight": 3, "temperature": 2}]


def test_a_piece_that_chooses_sees_no_test_image(images):
    hidden, digits = study.visible(images, "train"), study.digits()
    assert list_images(hidden).keys() == {"train"}
    assert len(list_images(hidden)["train"]) == 12
    assert list_images(study.visible(images, None)).keys() == {"train", "test"}
    parts = list_images(digits)
    counts = [sum(map(len, parts[part].values())) for part in ("train", "test")]
    assert counts[1] / sum(counts) == pytest.approx(0.25, abs=0.01)
    far = study.parameters(study.PIECES["ideas-far"], 0, images)["split"]["tasks"]
    assert all(task["root"].split("/")[1].split("-")[1] == "train" for task in far)
    assert len(far[0]["classes"]) == len(far[1]["classes"]) == 10


def test_what_is_done_is_not_done_again_and_other_parameters_are_refused(images, monkeypatch):
    done = []
    monkeypatch.setattr(study, "PIECES", {"piece": {"seeds": [3, 4, 5], "changes": {}}})

    def run(params, target):
        done.append(params["seeds"][0])
        if len(done) == 2:
            raise KeyboardInterrupt
        return [{"seed": params["seeds"][0], "acc_mean": 0.5}]

    monkeypatch.setattr(study, "run_workflow", run)
    with pytest.raises(KeyboardInterrupt):
        study.do_piece("piece", images)
    assert [row["seed"] for row in study.read_rows("piece")] == [3]
    study.do_piece("piece", images)
    assert done == [3, 4, 4, 5]
    lines = (study.ROWS / "piece.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [3, 4, 5]
    study.PIECES["piece"]["changes"]["sweep.pcts"] = [0.1]
    with pytest.raises(SystemExit, match="other parameters"):
        study.do_piece("piece", images)


def test_the_best_is_the_best_on_average_and_what_failed_is_worth_nothing(images):
    other = [dict(row) for row in TUNED]
    for row in other:
        weight = row["hyper"]["weight"]
        row |= {"acc_mean": 0.9 if (weight, row["seed"]) == (10, 0) else row["acc_mean"]}
        row |= {"status": "failed"} if (weight, row["seed"]) == (10, 1) else {}
    study.write_rows("sizes", other)
    assert study.best_hyperparameters("sizes")["lwf"] == [{"weight": 3, "temperature": 2}]
    other[-1] |= {"status": "done"}
    study.write_rows("sizes", other)
    assert study.best_hyperparameters("sizes")["lwf"] == [{"weight": 10, "temperature": 2}]


def test_where_the_images_lie_is_no_parameter_and_lwf_is_tuned_in_all_that_contain_it(
    images, tmp_path
):
    piece = study.PIECES["ideas"]
    other = tmp_path / "elsewhere/another name"
    shutil.copytree(images, other)
    here, there = (study.parameters(piece, 0, root) for root in (images, other))
    assert study.digest_of(here) == study.digest_of(there)
    for name in ("lwf", "freeze_lwf", "soft_lwf", "lwm", "afc"):
        assert here["tune"][name][0]["weight"] == 3
    tried = study.parameters(study.PIECES["tune-explained"], 0, images)["tune"]["lwm"]
    assert [trial["weight"] for trial in tried] == [3, 3, 3]
    here["tune"]["ewc"] = [{"strength": 7}]  # which the piece does not run
    assert study.digest_of(here) == study.digest_of(there)
    here["tune"]["lwf"] = [{"weight": 7, "temperature": 2}]
    assert study.digest_of(here) != study.digest_of(there)


def test_draws_by_chance_differ():
    evidence = Evidence({"a": torch.zeros(9, 1, 1, 1)}, {}, seed=3)
    drawn = [draw(evidence)["a"] for draw in (random, draws.second, draws.third)]
    assert len({tuple(scores.flatten().tolist()) for scores in drawn}) == 3


def test_tuning_comes_first(images):
    study.write_rows("tune", TUNED[:3])
    with pytest.raises(SystemExit, match="to be done first"):
        study.parameters(study.PIECES["ideas"], 0, images)


def made(strategy, seed, accuracy, **more):
    row = {
        "strategy": strategy, "seed": seed, "acc_mean": accuracy, "status": "done", "metric": None,
        "pct": None, "twin": None, "hyper": {}, "head": "multi",
        "R": [[0.1, 0.1], [0.5, 0.1], [accuracy, accuracy]],
        "memory_bytes": 1e6, "seconds": 2.0, "acc_mean_without_task": None, "remark": "",
        "forgetting": 0.5 - accuracy, "drift": {"features.10": seed - accuracy, "features.3": seed},
    }  # fmt: skip
    return row | more


def test_a_margin_is_over_the_best_of_twins_and_baselines_on_the_same_seeds():
    rows = [made("lwf", seed, 0.5 + seed) for seed in (0, 1)]
    rows += [made("soft", 0, 0.7, metric="attribution")]
    rows += [made("soft", 0, 0.6, metric="attribution", twin="chance")]
    rows += [made("edges", seed, 0.4) for seed in (0, 1)]
    rows += [made("edges", seed, 0.1, twin="chance") for seed in (0, 1)]
    rows += [made("freeze", 0, 0.6, metric=name, pct=0.5) for name in ("attribution", "random")]
    rows += [made("freeze", 0, 0.9, metric="random", pct=0.75)]
    found = choosing.margins(rows)
    assert {name: (round(value, 9), *rest) for name, (value, *rest) in found.items()} == {
        "soft attribution": (0.1, 1, "soft attribution (chance)"),
        "edges": (-0.6, 2, "lwf"),
        "freeze attribution 50%": (0.0, 1, "freeze random 50%"),
    }
    # A twin that some seeds lack is compared on those that have it.
    rows += [made("edges", 2, 0.0), made("packnet", 2, 0.9)]
    assert choosing.margins(rows)["edges"] == (pytest.approx(-0.9), 1, "packnet")
    assert {name for pieces in choosing.SETTINGS.values() for name in pieces} <= set(study.PIECES)


def test_claims_of_all_pieces_are_adjusted_together(images, monkeypatch):
    better = [made("a", seed, 0.6 + seed / 100) for seed in range(5)]
    noise = [made("b", seed, 0.5 + (seed % 2) / 50) for seed in range(5)]
    study.write_rows("one", better + noise)
    much = [row | {"acc_mean": 0.9 + row["seed"] / 1000} for row in better]
    study.write_rows("two", much + noise)
    for name in ("one", "two"):
        monkeypatch.setitem(study.PIECES, name, {"about": "One piece", "seeds": range(5)})
    claim = {"source": "s", "text": "t", "left": {"strategy": "a"}, "right": {"strategy": "b"}}
    alone, other = (findings.hold({piece: [claim]})[piece][0] for piece in ("one", "two"))
    together = findings.hold({"one": [claim], "two": [claim]})
    assert other.p_adjusted < alone.p_adjusted
    assert together["one"][0].p_adjusted == pytest.approx(alone.p_adjusted)
    assert together["two"][0].p_adjusted == pytest.approx(2 * other.p_adjusted)
    assert alone.verdict == "holds"
    assert "| a | 62.0 (" in findings.tables()
    assert "| s | t | mean | +" in findings.claims({"one": [alone]}, "some-tag")


def test_the_picture_shows_what_the_explanation_adds(tmp_path):
    def tested(left, right, difference):
        return claims.Tested(claims.Claim("s", "text", left, right), difference, 0.01, ())

    found = Difference(0.01, 0.005, 0.015, 2.0, 0.01, 10)
    one = {"strategy": "edges", "twin": None}
    equal = tested(one, one | {"twin": "uniform"}, found)
    mse = {"strategy": "freeze", "metric": "mse"}
    chance = tested(mse, mse | {"metric": "random"}, found)
    lwf = {"strategy": "lwf"}
    lwm = tested({"strategy": "lwm"}, lwf, found)  # LwF with an explanation
    others = [tested(one, lwf, found), tested(one, one | {"twin": "uniform"}, None)]
    shown = forest.of_explanations({"A": [equal, *others, lwm], "B": others, "C": [chance]})
    assert shown == {"A": [equal, lwm], "C": [chance]}
    forest.draw_forest(tmp_path / "found.png", shown, "What it adds")
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width == 9 * 150


def test_a_front_is_measured_by_what_it_dominates():
    assert findings.hypervolume([(0.5, 0.5)]) == 0.25
    points = [(0.8, 0.2), (0.5, 0.5), (0.4, 0.4)]  # the last is dominated
    assert findings.hypervolume(points) == pytest.approx(0.8 * 0.2 + 0.5 * 0.3)
    rows = [made("finetune", seed, 0.0, R=[[0.2, 0.8]], pct=None) for seed in (0, 1)]
    for kept in (0.4, 0.6):  # two draws, whose mean counts
        rows += [
            made("freeze", seed, 0.0, R=[[kept, 0.5]], metric="random", pct=0.5) for seed in (0, 1)
        ]
    assert "| random | 31.0" in findings.fronts(rows)


def test_how_much_of_the_forgetting_goes_with_drift(images):
    drawn = (0.01, -0.02, 0.03, -0.01)
    rows = [
        made(strategy, seed, accuracy + drawn[seed] / 10)
        for seed in range(4)
        for strategy, accuracy in (("finetune", 0.1), ("freeze", 0.2), ("lwf", 0.4))
    ]
    for number, row in enumerate(rows):  # of each seed the same, of the second layer unlike it
        row["drift"]["features.3"] += (0.1, 0.3, 0.1)[number % 3]
    packed = [made("packnet", seed, 0.4, remark=PackNet.remark) for seed in range(4)]
    lines = findings.drift_table([*rows, *packed]).splitlines()
    assert lines[0] == "| layer | fine-tuning's drift | r (3 methods) |"
    assert lines[2] == "| features.3 | 1.60 | 0.19 |"  # in the order of the layers
    assert lines[3] == "| features.10 | 1.40 | 1.00 |"


def test_how_far_rankings_can_be_trusted(images):
    def checks(halves, truth):
        found = {f"features.{n}": {"spearman": v, "top_half": 1.0} for n, v in halves.items()}
        return {"checks": {"halves": found}, "ablation": truth}

    truth = {"features.10": [0.1, 0.3], "features.3": [0.5, 0.7]}
    rows = [
        {"seed": seed, "criterion": name} | checks(halves, truth)
        for seed in (10, 11, 12)
        for name, halves in (("a", {3: 0.8 + seed / 100, 10: 0.8}), ("b", {10: 0.1}))
    ]
    study.write_rows("stability", rows)
    lines = findings.stability().rstrip().splitlines()
    assert "mean over 3 seeds" in lines[2]
    assert lines[4] == "| layer | a, halves | b, halves | a, ablation | b, ablation |"
    assert lines[6:] == [
        "| features.3 | 0.91 (0.90) | – | 0.60 | 0.60 |",
        "| features.10 | 0.80 (0.80) | 0.10 (0.10) | 0.20 | 0.20 |",
    ]


def rows_of(piece, images):
    """Return what a piece's rows say of their runs."""
    params = Params.model_validate(study.parameters(piece, piece["seeds"][0], images))
    chosen = {head: {n: grid[0] for n, grid in grids(params).items()} for head in heads(params)}
    for run in sweep_runs(params, chosen):
        metric = "random" if str(run.metric).startswith("custom.draws:") else run.metric
        yield vars(run) | {"hyper": run.hyperparameters, "metric": metric}


def test_each_side_of_a_planned_claim_is_one_method(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "custom.draws", draws)
    best = {"edges": {"share": 0.5, "shares": "explained", "mix": 0.5, "by": "magnitude"}}
    for piece in TUNING:
        by = {"by": "score"} if piece == "sizes-far" else {}
        tuned = [r | {"strategy": name, "hyper": best[name] | by} for r in TUNED for name in best]
        study.write_rows(piece, TUNED + tuned)
    plan = yaml.safe_load(findings.PLAN.read_text())["claims"]
    for name, planned in plan.items():
        rows = list(rows_of(study.PIECES[name], images))
        for claim in planned:
            sides = [claims._matching(rows, claim[side]) for side in ("left", "right")]
            assert sides[0] != sides[1]
            for side in sides:
                of = {(r["strategy"], r["head"], r["twin"], str(r["hyper"])) for r in side}
                assert len(of) == 1, claim
                draws_of = Counter(row["pct"] for row in side)
                assert set(draws_of.values()) == {3 if side[0]["metric"] == "random" else 1}


def test_a_claim_without_an_answer_counts_among_those_planned(images, monkeypatch):
    claim = {"source": "s", "text": "t", "left": {"strategy": "a"}, "right": {"strategy": "b"}}
    monkeypatch.setitem(study.PIECES, "one", {"about": "One piece", "seeds": range(4)})
    rows = [made("a", seed, 0.6 + seed / 100) for seed in range(4)]
    rows += [made("b", seed, 0.5 + (seed % 2) / 50) for seed in range(4)]
    rows += [made("same", seed, 0.6 + seed / 100) for seed in range(4)]
    rows += [made("lost", seed, 0.0, status="failed", memory_bytes=None) for seed in range(4)]
    study.write_rows("one", rows[:-1])
    alone = findings.hold({"one": [claim]})["one"][0]
    others = [claim | {"right": {"strategy": name}} for name in ("same", "short")]
    rows += [made("short", seed, 0.3) for seed in range(3)]  # which failed on the last
    study.write_rows("one", rows)
    first, *rest = findings.hold({"one": [claim, *others]})["one"]
    assert first.p_adjusted == pytest.approx(3 * alone.p_adjusted)
    assert [(each.p_adjusted, each.verdict) for each in rest] == [(None, "undecided")] * 2
    study.write_rows("one", rows[:-4])
    assert "| lost | – | – | – | – | – | – | 0 (3 failed) |" in findings.tables()
    assert "undecided: lost (seed 0, 1, 2)." in findings.claims({"one": [first]}, "tag")
    with pytest.raises(SystemExit, match="no rows of both sides: t"):
        findings.hold({"one": [claim | {"left": {"strategy": "lost"}}]})
    monkeypatch.setitem(study.PIECES, "one", {"about": "One piece", "seeds": range(5)})
    undone = findings.hold({"one": [claim]})  # a seed is left to do
    assert [(e.difference, e.verdict) for e in undone["one"]] == [(None, "undecided")]
    assert "Not done yet." in findings.claims(undone, "tag")
    assert "lost" not in findings.tables()
