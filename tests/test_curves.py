"""A run in MLflow for each curve: accuracies against the share of frozen filters."""

import pytest

from pages import made_rows
from permafrost.curves import VIEW, curve_records, curves_view
from permafrost.params import Params
from permafrost.tracking import CURVES, Tracker

PARAMS = Params(seeds=[0, 1, 2])


@pytest.fixture
def rows():
    other = {"strategy": "lwf", "metric": None, "pct": None, "hyper": {"weight": 3.0}}
    made = made_rows()
    made += [row | other for row in made if row["strategy"] == "finetune"]
    names = {"acc_task1": lambda row: row["R"][-1][0], "acc_task2": lambda row: row["R"][-1][1]}
    return [
        row | {"key": f"key{place}", "forgetting": 0.1} | {n: of(row) for n, of in names.items()}
        for place, row in enumerate(made)
    ]


def test_a_curve_has_a_step_for_each_share_and_begins_with_fine_tuning(rows):
    records = {record.name: record for record in curve_records(rows, PARAMS)}
    assert [*records] == [
        "freeze mse multi",
        "freeze random multi",
        "finetune multi",
        "lwf multi",
    ]
    assert len({record.all_tags["mlflow.runColor"] for record in records.values()}) == 4
    curve = records["freeze mse multi"].curves
    assert [point["step"] for point in curve] == [0, 25, 75]
    at_quarter = [row for row in rows if (row["metric"], row["pct"]) == ("mse", 0.25)]
    mean = sum(row["acc_task1"] for row in at_quarter) / 3
    assert curve[1]["acc_task1"] == curve[1]["kept"] == pytest.approx(mean)
    assert curve[1]["interval/kept_low"] < mean < curve[1]["interval/kept_high"]
    assert [point["step"] for point in records["lwf multi"].curves] == [0]
    assert records["lwf multi"].params["weight"] == 3.0
    assert not {"pct", "seed"} & records["freeze mse multi"].params.keys()
    wanted = [row["key"] for row in rows if row["metric"] == "mse"]
    assert records["freeze mse multi"].tags["runs"].split(",") == wanted


def test_a_curve_of_joint_training_is_named_by_its_epochs(rows):
    joint = {"strategy": "joint", "hyper": {"passes": 2}}
    [record] = curve_records([row | joint for row in rows if row["strategy"] == "lwf"], PARAMS)
    assert record.name == "joint 20 epochs multi"


def test_the_view_shows_what_curves_have(rows):
    view = curves_view()
    measured = curve_records(rows, PARAMS)[0].curves[0]
    assert [chart["metricKey"] for chart in view["compareRunCharts"]] == [
        name for name in ("kept", "learned", "acc_mean", "forgetting") if name in measured
    ]
    sections = {section["uuid"]: section["display"] for section in view["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} == {VIEW}
    assert sections == {VIEW: True, "more": False, "interval": False}


def test_a_further_share_belongs_to_the_same_curve_and_other_settings_do_not(rows):
    def key(rows, params=PARAMS):
        return next(r.key for r in curve_records(rows, params) if r.name == "freeze mse multi")

    fewer = [row for row in rows if row["pct"] != 0.75]
    assert key(fewer) == key(rows)
    assert key(rows, PARAMS.model_copy(update={"seeds": [0, 1]})) != key(rows)


def test_failed_runs_and_single_seeds_are_no_trouble(rows):
    alone = [row for row in rows if row["seed"] == 0]
    broken = [{"strategy": "ewc", "status": "failed", "error": "it diverged"}]
    for record in curve_records([*alone, *broken], PARAMS):
        assert not [name for point in record.curves for name in point if name.endswith("_low")]


def test_mlflow_holds_one_run_for_a_curve_that_has_grown(rows, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(tmp_path)
    for found in ([row for row in rows if row["pct"] != 0.75], rows):
        tracker.reconcile(curve_records(found, PARAMS), lambda _key: False)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name(CURVES)
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 4
    (run,) = [run for run in runs if run.info.run_name == "freeze mse multi"]
    history = client.get_metric_history(run.info.run_id, "kept")
    assert [point.step for point in history] == [0, 25, 75]
