"""The whole workflow in a copy of the project: DVC, MLflow, experiments, nothing replaced."""

from pathlib import Path

import pytest

from project import RESULTS, Project, stages_run, wait_for

pytestmark = pytest.mark.usefixtures("one_run_for_each_training")

VARIANT_STAGES = ["freeze@0", "train_second@0", "evaluate", "report", "page"]


def test_repro_writes_results_and_pictures(project: Project) -> None:
    rows = project.read("metrics/sweep.json")
    assert [(row["strategy"], row["pct"]) for row in rows] == [
        ("finetune", None),
        ("freeze", 0.25),
        ("freeze", 0.5),
    ]
    for row in rows:
        assert row["status"] == "done"
        assert row["acc_task1"] == row["R"][2][0]
        assert row["forgetting"] == row["R"][1][0] - row["R"][2][0]
    # The variant and the sweep's run of the same name are one training.
    variant = project.read("metrics/variant.json")
    assert variant["seeds"][0] == rows[1]
    assert variant["acc_task1"] == {"mean": rows[1]["acc_task1"], "low": None, "high": None}
    assert len(project.cells()) == 4  # the first task, fine-tuning, 25% and 50%
    # A single entry is taken as it is: no trial.
    choice = {"freeze": {"chosen": {"pct": 0.5}, "trials": [], "at_edge": []}}
    assert project.read("metrics/tune.json") == {"seed": 0, "heads": {"shared": choice}}
    assert project.read("metrics/trials.json") == {"trials": []}
    compared = project.read("metrics/comparison.json")["shared"]
    assert compared.keys() == {"finetune", "freeze"}
    assert compared["freeze"].keys() == {"mse"}
    for share, row in zip(("25%", "50%"), rows[1:], strict=True):
        found = compared["freeze"]["mse"][share]
        assert found.pop("seeds") == 1
        assert {name: interval["mean"] for name, interval in found.items()} == {
            name: row[name] for name in ("acc_task1", "acc_task2", "acc_mean", "forgetting")
        }

    tables = (project.folder / "reports/tables.md").read_text()
    assert f"| 25% | {100 * rows[1]['acc_task1']:.1f} |" in tables
    assert "### By metric, 50% of the filters frozen" in tables
    lines = tables.splitlines()
    _, fine_tuning = (line for line in lines if line.startswith("| finetune |"))
    assert fine_tuning.endswith("| 0.00 | 100% |  |")
    _, frozen = (line for line in lines if line.startswith("| freeze mse 50% |"))
    assert f"| {rows[2]['memory_bytes'] / 1e6:.2f} |" in frozen
    assert "| freeze | pct 0.5 |" in tables
    timings = project.read("reports/timings.json")
    assert set(timings["stages"]) >= {"split@0", "train_first@0", "consolidate@0", "tune", "sweep"}
    assert "consolidate" not in timings  # no strategy of the sweep needs anything
    names = {"finetune shared seed 0", "freeze mse 25% shared seed 0"}
    assert names < set(timings["runs"])
    assert min(timings["runs"].values()) > 0
    pictures = {str(path.relative_to(project.folder)) for path in project.folder.rglob("*.png")}
    assert {"reports/saliency/0.png", "reports/rank/0.png", "reports/kept_and_learned.png"} <= (
        pictures
    )
    layers = sorted((project.folder / "reports/visualize/0").glob("*.png"))
    assert len(layers) == 8  # VGG11's convolutions


def test_mlflow_holds_parameters_curves_and_pictures(project: Project) -> None:
    client, row = project.client(), project.read("metrics/variant.json")["seeds"][0]
    names = {
        experiment.name: experiment.experiment_id for experiment in client.search_experiments()
    }
    (run,) = client.search_runs([names["permafrost"]], f"tags.key = '{row['key']}'")
    shown = {"strategy": "freeze", "metric": "mse", "pct": "0.25", "seed": "0", "head": "shared"}
    assert shown.items() <= run.data.params.items()
    assert {"dataset": "digits", "model.arch": "vgg11"}.items() <= run.data.params.items()
    for name in ("acc_task1", "acc_task2", "acc_mean", "forgetting"):
        assert run.data.metrics[name] == pytest.approx(row[name])
    curve = client.get_metric_history(run.info.run_id, "epoch_acc_task1")
    assert [point.step for point in curve] == [1, 2]
    assert curve[-1].value == pytest.approx(row["acc_task1"])

    (variant,) = client.search_runs([names["permafrost-variants"]])
    artifacts = {entry.path for entry in client.list_artifacts(variant.info.run_id)}
    assert artifacts == {
        "filters",
        "index.html",
        "kept_and_learned.png",
        "rank",
        "saliency",
        "tables.md",
    }


def test_repro_again_does_nothing(project: Project) -> None:
    output = project.run("dvc", "repro")
    assert stages_run(output) == []
    assert "up to date" in output
    status = project.run("git", "status", "--porcelain").splitlines()
    assert status == [f"?? {name}" for name in RESULTS]


def test_exp_run_reruns_only_what_reads_the_parameter(project: Project) -> None:
    before = project.cells()
    output = project.run("dvc", "exp", "run", "-S", "freeze.pct=0.5")
    assert stages_run(output) == VARIANT_STAGES
    assert project.cells() == before  # the sweep has trained it already
    frozen = project.read("models/freeze/0.json")
    assert frozen["pct"] == 0.5
    for layer in frozen["layers"].values():
        assert len(layer["frozen"]) == int(layer["filters"] / 2 + 0.5)


def test_exp_run_in_a_temporary_copy(project: Project) -> None:
    before, runs = project.read("metrics/variant.json"), project.cells()
    params = (project.folder / "params.yaml").read_text()
    output = project.run("dvc", "exp", "run", "--temp", "-S", "freeze.pct=0.75")
    assert stages_run(output) == VARIANT_STAGES
    assert project.read("metrics/variant.json") == before  # the workspace stays
    assert len(project.cells() - runs) == 1
    assert (project.folder / "params.yaml").read_text() == params


def test_queue(project: Project) -> None:
    runs = project.cells()
    project.run("dvc", "exp", "run", "--queue", "-S", "freeze.pct=0.1,0.9")
    project.run("dvc", "queue", "start")
    wait_for(lambda: project.run("dvc", "queue", "status").count("Success") == 2, 300, "the queue")
    assert len(project.cells() - runs) == 2
    shown = project.run("dvc", "exp", "show", "--csv")
    assert {"0.1", "0.9"} <= set(shown.replace("\n", ",").split(","))


def test_dvc_shows_something_to_read(project: Project) -> None:
    assert "acc_task1" in project.run("dvc", "metrics", "show")
    project.change({"freeze": {"pct": 0.125}})
    assert "0.125" in project.run("dvc", "params", "diff")
    project.change({"freeze": {"pct": 0.5}})
    page = project.run("dvc", "plots", "show").strip().splitlines()[-1]
    text = Path(page.removeprefix("file://")).read_text()
    assert "Accuracy after each epoch" in text
    assert '"kept"' in text


def test_forced_repro_trains_nothing_twice(project: Project) -> None:
    runs = {path: path.stat().st_mtime_ns for path in project.folder.glob(".permafrost/cells/*/*")}
    output = project.run("dvc", "repro", "-f", "--single-item", "train_second@0", "sweep")
    assert stages_run(output) == ["train_second@0", "sweep"]
    again = {path: path.stat().st_mtime_ns for path in project.folder.glob(".permafrost/cells/*/*")}
    assert runs == again


def test_fresh_rebuild_gives_the_same_bits(project: Project) -> None:
    path = project.folder / "models/train_second/0.safetensors"
    before = path.read_bytes()
    record = project.read("metrics/train_second/0.json")
    run = project.folder / ".permafrost/cells" / record["key"] / "cell.json"
    written = run.stat().st_mtime_ns
    project.run("dvc", "repro", "-f", "--single-item", "train_second@0", PERMAFROST_FRESH="1")
    assert run.stat().st_mtime_ns > written
    assert path.read_bytes() == before
    assert project.read("metrics/train_second/0.json") == record


def test_track_after_the_run_cache_restored_stages(project: Project) -> None:
    for path in project.folder.glob("mlflow.db*"):
        path.unlink()
    output = project.run("dvc", "exp", "run", "-S", "freeze.pct=0.25")
    assert "train_second@0" not in stages_run(output)
    project.run("permafrost", "track")
    assert project.runs() == project.expected_runs()
    assert "0 runs written" in project.run("permafrost", "track")
