"""Single commands in a copy of the project whose workflow has run: kill -9, damage, the UI."""

import os
import signal
import urllib.request

import pytest

from project import Project, wait_for

pytestmark = pytest.mark.usefixtures("one_run_for_each_training")


def test_killed_training_resumes(project: Project) -> None:
    project.change({"train": {"epochs": 12}})
    cells = project.cells()
    command = ("permafrost", "train_first", "--seed", "0")
    process = project.start(*command, start_new_session=True)
    store = project.folder / ".permafrost/cells"

    def begun() -> bool:
        return any(path.parent.name not in cells for path in store.glob("*/checkpoint.safetensors"))

    wait_for(begun, 120, "the first checkpoint")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert project.cells() == cells  # it was killed in the middle
    assert [status for _, status in project.runs() - project.expected_runs()] == ["RUNNING"]
    project.run("permafrost", "track")
    assert project.runs() == project.expected_runs()

    project.run(*command)
    (key,) = project.cells() - cells
    record = project.read(f".permafrost/cells/{key}/cell.json")["record"]
    assert [row["epoch"] for row in record["history"]] == list(range(1, 13))
    files = [store / key / name for name in ("model.safetensors", "kept.safetensors")]
    resumed = [path.read_bytes() for path in files]
    integral = project.folder / "models/path_integral/0.safetensors"
    assert integral.read_bytes() == resumed[1]
    project.run(*command, PERMAFROST_FRESH="1")
    assert [path.read_bytes() for path in files] == resumed
    project.change({"train": {"epochs": 2}})


def test_metric_of_ones_own(project: Project) -> None:
    own = "custom.centre_distance:centre_distance"
    project.change({"rank": {"metrics": ["mse", "random", own]}, "freeze": {"metric": own}})
    project.run("permafrost", "rank", "--seed", "0")
    project.run("permafrost", "freeze", "--seed", "0")
    frozen = project.read("models/freeze/0.json")
    assert frozen["metric"] == own
    project.change({"freeze": {"metric": "mse"}})
    project.run("permafrost", "freeze", "--seed", "0")
    assert project.read("models/freeze/0.json")["layers"] != frozen["layers"]


def test_damaged_artifacts_are_refused(project: Project) -> None:
    for name, stage in (("train_first", "saliency"), ("path_integral", "consolidate")):
        path = project.folder / f"models/{name}/0.safetensors"
        whole = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(whole[: len(whole) // 2])
        output = project.run("permafrost", stage, "--seed", "0", code=2)
        assert output.count("\n") == 1
        assert f"models/{name}/0.safetensors" in output
        path.write_bytes(whole)
    path = project.folder / "metrics/tune.json"
    whole = path.read_bytes()
    path.write_bytes(b'{"heads": {}}')
    output = project.run("permafrost", "sweep", code=2)
    assert output.count("\n") == 1
    assert "metrics/tune.json" in output
    path.write_bytes(whole)


def test_trials_choose_the_frozen_share(project: Project) -> None:
    cells = project.cells()
    project.change({"tune": {"freeze": [{"pct": 0.25}, {"pct": 0.75}]}})
    project.run("permafrost", "tune")
    choice = project.read("metrics/tune.json")["heads"]["shared"]["freeze"]
    trials = choice["trials"]
    assert [trial["hyper"] for trial in trials] == [{"pct": 0.25}, {"pct": 0.75}]
    best = max(trials, key=lambda trial: trial["acc_mean"])
    assert choice["chosen"] == best["hyper"]
    assert project.cells() - cells == {trial["key"] for trial in trials}
    assert project.tags("permafrost-trials", "key") == {trial["key"]: 1 for trial in trials}
    assert project.tags("permafrost-trials", "kind") == {"trial": 2}


def test_gc_deletes_only_unused_trainings(project: Project) -> None:
    used = {row["key"] for row in project.read("metrics/sweep.json")}
    choice = project.read("metrics/tune.json")["heads"]["shared"]["freeze"]
    assert len(choice["trials"]) == 2
    used |= {trial["key"] for trial in choice["trials"]}
    used |= {
        project.read(f"metrics/{stage}/0.json")["key"] for stage in ("train_first", "train_second")
    }
    project.run("permafrost", "gc", "--yes")
    assert project.cells() == used


def test_ui_opens_on_the_right_store(project: Project) -> None:
    process = project.start("permafrost", "ui", "--port", "5917", start_new_session=True)

    def answers() -> bool:
        try:
            with urllib.request.urlopen("http://127.0.0.1:5917/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    try:
        wait_for(answers, 120, "the UI's start")
        url = "http://127.0.0.1:5917/api/2.0/mlflow/experiments/get-by-name?experiment_name=permafrost"
        with urllib.request.urlopen(url) as answer:
            assert str(project.folder / "mlruns") in answer.read().decode()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    assert "http://127.0.0.1:5917/#/experiments/" in output
