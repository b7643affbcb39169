"""The plan: which trainings a sweep has, what is tried, and how each is named."""

import dataclasses
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from permafrost.params import Sweep
from permafrost.plan import grids, method_run, sweep_runs
from permafrost.runs.spec import RunSpec
from permafrost.strategies import STRATEGIES
from small_runs import FINETUNE, FREEZE, LWF, chosen_for, make_joint, make_params

# They rank filters without a share of them.
RANKED = ("rows", "circuit", "soft", "circuit_lwf", "soft_lwf", "afc_ranked")


def count(specs, **wanted):
    return sum(all(getattr(spec, k) == v for k, v in wanted.items()) for spec in specs)


def test_the_cells_of_a_sweep_by_hand():
    params = make_params(
        seeds=[0, 1, 2],
        sweep={
            "metrics": ["mse", "random"],
            "pcts": [0.25, 0.5, 0.75],
            "heads": ["shared", "multi"],
        },
    )
    specs = sweep_runs(params, chosen_for(params))
    assert count(specs, strategy="freeze") == 2 * 3 * 2 * 3  # the chosen share is one of them
    assert count(specs, strategy="finetune") == 2 * 3
    assert count(specs, strategy="linear_probe") == 2 * 3
    assert count(specs, strategy="joint") == 3 * 3 * 2  # one softmax of all classes too
    assert count(specs, strategy="joint", head="expanding", hyper=(("passes", 2),)) == 3
    assert len(specs) == 36 + 6 + 6 + 18
    assert len(set(specs)) == len(specs)
    assert RunSpec("freeze", 2, "multi", "random", 0.75) in specs
    assert {(spec.metric, spec.pct) for spec in specs if spec.strategy != "freeze"} == {
        (None, None)
    }


def test_the_stage_reads_all_by_which_its_runs_are_chosen():
    stage = YAML(typ="safe").load(Path("dvc.yaml").read_text())["stages"]["sweep"]
    names = {f"sweep.{name}" for name in Sweep.model_fields} - {"sweep.workers"}
    assert names <= set(stage["params"])


def test_the_cells_of_smaller_sweeps():
    sweep = {"strategies": ["joint"], "heads": ["expanding"]}
    params = make_params(sweep=sweep, split={"tasks": 3})
    assert sweep_runs(params, chosen_for(params)) == [
        make_joint(0, "expanding", 1),
        make_joint(0, "expanding", 3),
    ]
    params = make_params(seeds=[3, 4, 5], sweep=sweep | {"joint_seeds": 2})
    assert [spec.seed for spec in sweep_runs(params, chosen_for(params))] == [3, 3, 4, 4]
    params = make_params(sweep={"strategies": ["finetune"], "metrics": [], "pcts": []})
    assert sweep_runs(params, chosen_for(params)) == [FINETUNE]


def test_the_chosen_share_joins_those_of_the_sweep():
    sweep = {"strategies": ["freeze"], "metrics": ["mse", "random"], "pcts": [0.75, 0.25]}
    sweep["heads"] = ["shared", "multi"]
    params = make_params(sweep=sweep)
    chosen = {"shared": {"freeze": {"pct": 0.5}}, "multi": {"freeze": {"pct": 0.25}}}
    found = [(s.head, s.metric, s.pct) for s in sweep_runs(params, chosen)]
    assert found == [
        ("shared", metric, pct) for metric in ("mse", "random") for pct in (0.25, 0.5, 0.75)
    ] + [("multi", metric, pct) for metric in ("mse", "random") for pct in (0.25, 0.75)]


def test_the_cells_of_the_other_methods():
    """Each with what was chosen for its head; frozen filters are the chosen share by one metric."""
    others = [name for name in STRATEGIES if name not in ("freeze", "joint")]
    params = make_params(
        seeds=[3, 4],
        freeze={"metric": "random", "pct": 0.125},
        sweep={"strategies": others, "heads": ["shared", "multi"]},
    )
    chosen = {
        head: {name: dict(grid[0]) for name, grid in grids(params).items()}
        for head in ("shared", "multi")
    }
    chosen["shared"]["freeze"]["pct"] = 0.375
    chosen["multi"]["freeze"]["pct"] = 0.625
    chosen["multi"]["freeze_ewc"]["strength"] = 7.0
    specs = sweep_runs(params, chosen)
    assert len(specs) == len(set(specs)) == len(others) * 2 * 2
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        mine = chosen[spec.head].get(spec.strategy, {})
        assert spec.hyperparameters == mine
        freezes = spec.strategy in ("freeze_ewc", "freeze_lwf")
        ranks = freezes or spec.strategy in RANKED
        assert spec.metric == ("random" if ranks else None)
        assert spec.pct == (chosen[spec.head]["freeze"]["pct"] if freezes else None)
        one = method_run(params, spec.strategy, spec.seed, spec.head, chosen[spec.head])
        assert one == spec
    assert RunSpec("freeze_ewc", 4, "multi", "random", 0.625, (("strength", 7.0),)) in specs
    share = method_run(params, "freeze", 3, "multi", chosen["multi"])
    assert share == RunSpec("freeze", 3, "multi", "random", 0.625)


def test_what_is_tried():
    """The frozen share first: those that freeze, too, need what was chosen."""
    params = make_params(
        sweep={"strategies": ["freeze_ewc", "finetune", "ewc", "joint"]},
        tune={"ewc": [{"strength": 1.0}], "si": [{"strength": 5.0}]},
    )
    found = grids(params)
    assert list(found) == ["freeze", "freeze_ewc", "ewc"]
    assert found["ewc"] == [{"strength": 1.0}]
    assert list(grids(make_params(sweep={"strategies": ["ewc", "freeze"]}))) == ["freeze", "ewc"]


def test_names_of_cells():
    params = make_params(seeds=[0, 1])
    specs = sweep_runs(params, chosen_for(params))
    assert len({spec.name for spec in specs}) == len(specs)
    assert FREEZE.name == "freeze mse 50% shared seed 0"
    assert make_joint(1, "multi", 2).name == "joint passes 2 multi seed 1"
    assert LWF.name == "lwf temperature 2 weight 0.5 shared seed 0"
    both = dataclasses.replace(FREEZE, strategy="freeze_ewc", hyper=(("strength", 1e-3),))
    assert both.name == "freeze_ewc mse 50% strength 0.001 shared seed 0"
    assert RunSpec("freeze", 0, "multi", "mse", 0.0).name == "freeze mse 0% multi seed 0"


def planned(strategies, metric="taylor", **tune):
    """Return the first head's runs, with their twins."""
    sweep = {"strategies": strategies, "metrics": [metric], "pcts": [0.5], "twins": True}
    params = make_params(freeze={"metric": metric}, sweep=sweep, tune=tune)
    return sweep_runs(params, chosen_for(params))


@pytest.mark.parametrize(
    ("strategy", "twins"),
    [
        ("finetune", []),
        ("lwf", []),
        ("packnet", []),
        ("soft", ["chance", "equal"]),
        ("soft_lwf", ["chance", "equal"]),
        ("rows", ["chance", "uniform", "magnitude", "depth", "untrained"]),
        ("edges", ["chance", "uniform", "magnitude", "untrained"]),
        ("circuit_lwf", ["chance", "uniform", "magnitude", "depth", "untrained"]),
        ("lwm", ["chance"]),
        ("afc", ["chance", "equal"]),
        ("afc_ranked", ["chance", "equal"]),
        ("rnf", ["chance"]),
        ("rrr", ["chance", "images"]),
    ],
)
def test_an_explained_run_has_its_twins(strategy, twins):
    """They differ from it in the explanation alone."""
    explained, *found = planned([strategy])
    assert explained.twin is None
    assert [run.twin for run in found] == twins
    assert {dataclasses.replace(run, twin=None) for run in found} <= {explained}
    assert len({run.name for run in [explained, *found]}) == 1 + len(twins)


def test_a_share_of_ranked_filters_is_controlled_by_chance():
    runs = planned(["freeze"])
    assert [(run.metric, run.twin) for run in runs] == [("taylor", None), ("random", None)]
    assert planned(["freeze"], "random") == [runs[1]]
    explained, twin = planned(["freeze_lwf"])
    assert twin == dataclasses.replace(explained, metric="random", twin="chance")


def test_what_is_not_explained_has_no_twin():
    """Neither uniform shares, nor a ranking that looks at weights alone."""
    uniform = {"share": 0.0, "shares": "uniform", "mix": 1.0}
    assert [run.twin for run in planned(["rows"], rows=[uniform])] == [None, "chance"]
    assert [run.twin for run in planned(["rows"], "magnitude", rows=[uniform])] == [None]
    assert [run.twin for run in planned(["soft"], "magnitude")] == [None]
    none = {"share": 0.0, "shares": "explained", "mix": 0.0}
    assert [run.twin for run in planned(["rows"], rows=[none])] == [None, "chance"]
    by_size = none | {"mix": 1.0, "by": "magnitude"}
    assert [run.twin for run in planned(["edges"], edges=[by_size])] == [
        None,
        "uniform",
        "magnitude",
        "untrained",
    ]
    idle = {"weight": 1.0, "temperature": 2.0, "attention": 0.0, "maps": "gradcam"}
    assert [run.twin for run in planned(["lwm"], lwm=[idle])] == [None]
