"""Single commands in a copy of the project whose workflow has run: kill -9, damage, the UI."""

import hashlib
import json
import os
import shutil
import signal
import socket
import time
import urllib.request
from functools import partial
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from permafrost.artifacts import save_record
from permafrost.errors import InputError
from permafrost.jobs import RunJob
from permafrost.plan import sweep_runs
from permafrost.runs import key
from permafrost.runs import store as runs
from permafrost.stages import run_pool
from permafrost.stages.run_pool import train_runs
from permafrost.stages.shared import open_stage
from permafrost.stages.tune import read_choices
from permafrost.stages.workspace import open_workspace
from project import Project, command_of, stages_run, wait_for

pytestmark = pytest.mark.usefixtures("one_run_for_each_training")


def test_killed_training_resumes(project: Project) -> None:
    project.change({"train": {"epochs": 12}})
    runs = project.cells()
    command = ("permafrost", "train_first", "--seed", "0")
    process = project.start(*command, start_new_session=True)
    store = project.folder / ".permafrost/cells"

    def begun() -> bool:
        return any(path.parent.name not in runs for path in store.glob("*/checkpoint.safetensors"))

    wait_for(begun, 120, "the first checkpoint")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert project.cells() == runs  # it was killed in the middle
    assert [status for _, status in project.runs() - project.expected_runs()] == ["RUNNING"]
    project.run("permafrost", "track")
    assert project.runs() == project.expected_runs()

    project.run(*command)
    (key,) = project.cells() - runs
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


@pytest.fixture(scope="module")
def tried(project: Project) -> set[str]:
    """Return the trainings by which stage tune has chosen between two shares."""
    runs = project.cells()
    project.change({"tune": {"freeze": [{"pct": 0.25}, {"pct": 0.75}]}})
    project.run("permafrost", "tune")
    return project.cells() - runs


def test_trials_choose_the_frozen_share(project: Project, tried: set[str]) -> None:
    choice = project.read("metrics/tune.json")["heads"]["shared"]["freeze"]
    trials = choice["trials"]
    assert [trial["hyper"] for trial in trials] == [{"pct": 0.25}, {"pct": 0.75}]
    best = max(trials, key=lambda trial: trial["acc_mean"])
    assert choice["chosen"] == best["hyper"]
    assert tried == {trial["key"] for trial in trials}
    rows = project.read("metrics/trials.json")["trials"]
    assert [(row["key"], row["pct"], row["acc_mean"]) for row in rows] == [
        (trial["key"], trial["hyper"]["pct"], trial["acc_mean"]) for trial in trials
    ]
    assert project.tags("permafrost-trials", "key") == {trial["key"]: 1 for trial in trials}
    assert project.tags("permafrost-trials", "kind") == {"trial": 2}


@pytest.mark.usefixtures("tried")
def test_gc_deletes_only_unused_trainings(project: Project) -> None:
    used = {row["key"] for row in project.read("metrics/sweep.json")}
    choice = project.read("metrics/tune.json")["heads"]["shared"]["freeze"]
    assert len(choice["trials"]) == 2
    used |= {trial["key"] for trial in choice["trials"]}
    used |= {
        project.read(f"metrics/{stage}/0.json")["key"] for stage in ("train_first", "train_second")
    }
    dropped = project.folder / "metrics/train_first/7.json"  # of a seed that is none any more
    store, key = project.folder / ".permafrost/cells", "0" * 32
    shutil.copytree(store / min(used), store / key)
    save_record(dropped, {"key": key})
    project.run("permafrost", "gc", "--yes")
    assert project.cells() == used | {key}
    dropped.unlink()
    project.run("permafrost", "gc", "--yes")
    assert project.cells() == used


def test_gc_keeps_what_other_commits_use(project: Project) -> None:
    """Their results lie in DVC's cache."""
    project.commit("results")  # or git deletes the summaries when it leaves the other branch
    key, store = "1" * 32, project.folder / ".permafrost/cells"
    stored = project.cells()
    shutil.copytree(store / min(stored), store / key)
    content = f'[\n {{\n  "key": "{key}"\n }}\n]\n'.encode()
    digest = hashlib.md5(content).hexdigest()
    cached = project.folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes(content)
    lock, before = project.folder / "dvc.lock", (project.folder / "dvc.lock").read_text()
    lock.write_text(f"    - path: metrics/sweep.json\n      hash: md5\n      md5: {digest}\n")
    project.run("git", "checkout", "-q", "-b", "other")
    project.commit("another sweep")
    project.run("git", "checkout", "-q", "main")
    lock.write_text(before)
    assert "0 trainings deleted" in project.run("permafrost", "gc", "--yes")
    assert project.cells() == stored | {key}
    project.run("git", "branch", "-q", "-D", "other")
    output = project.run("permafrost", "gc", "--yes")
    assert key in output  # it says what it deletes
    assert "1 trainings deleted" in output
    assert project.cells() == stored
    cached.unlink()


def test_gc_waits_for_trainings_that_are_under_way(project: Project) -> None:
    store = runs.RunStore(project.folder)
    stored = store.stored_keys()
    with store.lock(stored[0]):
        assert "a training is under way" in project.run("permafrost", "gc", "--yes", code=2)
    assert store.stored_keys() == stored


@pytest.mark.parametrize(
    "name", ["train_first/0.json", "train_second/0.json", "trials.json", "sweep.json"]
)
def test_gc_waits_for_results_that_are_missing(project: Project, name: str) -> None:
    """As of a sweep that was stopped: what it has trained is named nowhere yet."""
    path = project.folder / "metrics" / name
    whole = path.read_bytes()
    path.unlink()
    stored = project.cells()
    assert f"metrics/{name}: not found" in project.run("permafrost", "gc", "--yes", code=2)
    assert project.cells() == stored
    path.write_bytes(whole)


def test_a_seed_that_is_none_of_them(project: Project) -> None:
    output = project.run("permafrost", "split", "--seed", "99", code=2)
    assert output == "permafrost: --seed: 99 is none of seeds: 0\n"
    assert not (project.folder / "data/tasks/99.safetensors").exists()


def test_code_of_another_copy_is_refused(project: Project) -> None:
    """As in a queued experiment's copy, when the installed code has changed since."""
    path = project.folder / "src/permafrost/data/batches.py"
    content = path.read_text()
    path.write_text(content + "# other\n")
    output = project.run("permafrost", "rank", "--seed", "0", code=2)
    assert output.count("\n") == 1
    assert "src/permafrost: is not the code that runs" in output
    path.write_text(content)
    project.run("permafrost", "rank", "--seed", "0")


def test_what_a_killed_dvc_was_copying_is_deleted(project: Project) -> None:
    unfinished = ["models/rank/.SSYJqqO8PZS4ODpHG_5u-w.tmp"]
    unfinished += ["reports/visualize/0/features.0.png.SSYJqqO8PZS4ODpHG_5uGw.tmp"]
    others = ["models/rank/.in-use-aaaaaaaaaaaaaaa.tmp", "models/rank/own.tmp"]
    for name in (*unfinished, *others):
        path = project.folder / name
        path.write_bytes(b"part")
        written = time.time() + 60 if "in-use" in name else 0
        os.utime(path, (written, written))
    project.run("permafrost", "freeze", "--seed", "0")
    assert not [name for name in unfinished if (project.folder / name).exists()]
    for name in others:
        (project.folder / name).unlink()


def test_files_of_dropped_seeds_are_no_dependency(project: Project) -> None:
    """DVC would note them with the folders that they lie in, where no other copy has them."""
    dropped = [f"models/{name}/7.safetensors" for name in ("train_first", "rank", "consolidate")]
    dropped += ["data/tasks/7.safetensors", "metrics/train_second/7.json"]
    dropped += ["reports/visualize/7/features.0.png"]
    for name in dropped:
        (project.folder / name).parent.mkdir(exist_ok=True)
        (project.folder / name).write_bytes(b"of another seed")
    own = project.folder / "models/rank/notes.txt"
    own.write_text("the user's")
    kept = (project.folder / "models/rank/0.safetensors").read_bytes()
    assert stages_run(project.run("dvc", "repro", "-f", "-s", "evaluate")) == ["evaluate"]
    assert not [name for name in dropped if (project.folder / name).exists()]
    assert not (project.folder / "reports/visualize/7").exists()
    assert (project.folder / "models/rank/0.safetensors").read_bytes() == kept
    assert own.exists()
    own.unlink()
    lock = YAML(typ="safe").load(project.folder / "dvc.lock")
    deps = {dep["path"]: dep for dep in lock["stages"]["evaluate"]["deps"]}
    assert deps["metrics/train_second"]["nfiles"] == 1


@pytest.mark.parametrize(
    ("name", "told", "old", "new"),
    [
        ("params.yaml", "params.yaml", "epochs: 2", "epochs: 3"),
        ("src/permafrost/data/batches.py", "src/permafrost", "import torch", "import torch  # !"),
        ("custom/centre_distance.py", "custom", "import torch", "import torch  # !"),
    ],
)
def test_what_changes_while_a_stage_runs_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch, name: str, told: str, old: str, new: str
) -> None:
    monkeypatch.chdir(project.folder)
    path = project.folder / name
    before = path.read_text()
    changed = f"{told}: was changed while freeze ran"
    with pytest.raises(InputError, match=changed), open_stage("freeze", 0):
        path.write_text(before.replace(old, new))
    path.write_text(before)


def test_what_changes_while_a_stage_is_imported_is_refused(
    project: Project, tmp_path: Path
) -> None:
    """Its own file is read before any library is."""
    path = project.folder / "src/permafrost/stages/freeze.py"
    before = path.read_text()
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n\n"
        "class Editor:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'numpy':\n"
        f"            open({str(path)!r}, 'a').write('# edited')\n\n"
        "sys.meta_path.insert(0, Editor())\n"
    )
    code = f"{tmp_path}:{project.folder}/src"
    output = project.run("permafrost", "freeze", "--seed", "0", code=2, PYTHONPATH=code)
    path.write_text(before)
    assert output.startswith("permafrost: src/permafrost: was changed while freeze ran")


def test_stages_that_compute_nothing_need_no_pytorch(project: Project, tmp_path: Path) -> None:
    """To import it takes seconds."""
    (tmp_path / "torch.py").write_text("raise AssertionError('it was imported')\n")
    for command in (["freeze", "--seed", "0"], ["evaluate"], ["report"], ["page"], ["profile"]):
        project.run("permafrost", *command, PYTHONPATH=str(tmp_path))


def test_a_stage_that_logs_nothing_does_not_import_mlflow(project: Project, tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("import os\n\nos._exit(7)\n")
    for stage in ("split", "saliency", "visualize", "rank", "freeze", "consolidate"):
        project.run(*command_of(stage), PYTHONPATH=str(tmp_path))


def test_workers_of_other_code_than_their_stage_are_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    with open_workspace("sweep") as workspace:
        specs = sweep_runs(workspace.params, read_choices(workspace.params))
        stale = partial(RunJob, code="what the stage has imported")
        monkeypatch.setattr(run_pool, "RunJob", stale)
        with pytest.raises(InputError, match="src/permafrost: this code, or what is in custom"):
            train_runs(workspace, specs, "")


def test_workers_train_by_the_parameters_of_their_stage(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    key._sources.cache_clear()  # of another folder's custom
    params = project.folder / "params.yaml"
    before = params.read_text()
    with open_workspace("sweep") as workspace:
        specs = sweep_runs(workspace.params, read_choices(workspace.params))
        assert min(workspace.params.sweep.workers, len(specs)) > 1
        records = train_runs(workspace, specs, "")
        project.change({"train": {"lr": 0.002}})
        assert train_runs(workspace, specs, "") == records
        params.write_text(before)


def test_ui_refuses_a_port_of_another_program(project: Project) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        output = project.run("permafrost", "ui", "--port", str(port), code=2)
    assert f"--port: {port} is taken by another program" in output
    assert "Compare the runs" not in output


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
        curves = f"{url}-curves"
        with urllib.request.urlopen(curves) as answer:
            tags = json.load(answer)["experiment"]["tags"]
        (view,) = [
            tag["value"] for tag in tags if tag["key"] == "mlflow.sharedViewState.permafrost"
        ]
        assert json.loads(json.loads(view)["state"])["compareRunCharts"]
        assert len(psutil.Process(process.pid).children(recursive=True)) > 1
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert not answers()  # the server's own processes have ended, too
    assert "http://127.0.0.1:5917/#/experiments/" in output
    assert "viewStateShareKey=permafrost" in output
