"""MLflow filled from what DVC brings: a clone, a new store, a stage that has nothing to train."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from permafrost.artifacts import save_record
from permafrost.errors import InputError
from permafrost.outputs import runs_of_outputs
from permafrost.runs.store import RunStore
from permafrost.tracking import RunRecord
from permafrost.variants import variant_records
from project import Project, stages_run

MACHINE = {"device", "threads", "torch", "precision"}
UNLOGGED = "nothing was logged to MLflow; `permafrost track` logs what it lacks"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a project whose workflow has run, trials too, and was pushed."""
    folder = tmp_path_factory.mktemp("outputs")
    project = Project(folder / "project")
    project.change({"tune": {"freeze": [{"pct": 0.25}, {"pct": 0.5}]}})
    project.run("dvc", "remote", "add", "-d", "store", str(folder / "store"))
    output = project.run("dvc", "repro")
    assert UNLOGGED not in output
    project.run("dvc", "push")
    project.commit("results")
    return project


@pytest.fixture
def clone(project: Project, tmp_path: Path) -> Iterator[Project]:
    """Return a clone into which DVC has brought all results."""
    clone = copy.copy(project)
    clone.folder, clone.seen = tmp_path / "clone", set()
    project.run("git", "clone", "-q", str(project.folder), str(clone.folder))
    clone.run("dvc", "pull")
    yield clone
    shutil.rmtree(clone.folder)


def stored(project: Project) -> dict[str, RunRecord]:
    store = RunStore(project.folder)
    return {record.key: record for record in store.run_records() + variant_records(project.folder)}


def told(project: Project, known: set[str] | None = None) -> dict[str, RunRecord]:
    return {record.key: record for record in runs_of_outputs(project.folder, known or set())}


def test_outputs_tell_what_the_store_does_as_far_as_they_know(project: Project) -> None:
    whole, found = stored(project), told(project)
    assert found.keys() == whole.keys()
    kinds = [record.tags["kind"] for record in found.values()]
    assert sorted(set(kinds)) == ["cell", "first_task", "trial", "variant"]
    for key, record in found.items():
        known = whole[key]
        assert record.partial
        assert not known.partial
        assert (record.experiment, record.name) == (known.experiment, known.name)
        assert record.error == known.error
        assert record.tags.get("mlflow.note.content") == known.tags.get("mlflow.note.content")
        note = record.tags.get("mlflow.note.content", "")
        assert record.tags["kind"] == "variant" or note
        assert ("A control: chance" in note) == (record.params.get("metric") == "random")
        of_machine = {name: known.params[name] for name in MACHINE}
        assert {**record.params, **of_machine} == known.params
        assert record.metrics == known.metrics
        assert record.metrics
        assert record.curves in ([], known.curves)
        assert record.pictures.keys() == known.pictures.keys()
    variant = project.read("metrics/variant.json")["seeds"][0]["key"]
    first = project.read("metrics/train_first/0.json")["key"]
    assert {key for key, record in found.items() if record.curves} == {variant, first}


def test_what_is_known_better_is_left_out(project: Project) -> None:
    key = project.read("metrics/train_first/0.json")["key"]
    assert told(project).keys() - told(project, {key}).keys() == {key}
    assert told(project, set(stored(project))) == {}


def test_a_clone_fills_its_store(clone: Project, project: Project) -> None:
    assert not (clone.folder / ".permafrost/cells").exists()
    whole = stored(project)
    assert f"{len(whole)} runs written" in clone.run("permafrost", "track")
    assert clone.runs() == {(key, "FINISHED"): 1 for key in whole}
    kept = f"0 runs written, 0 runs deleted, {len(whole)} runs kept"
    assert kept in clone.run("permafrost", "track")
    client = clone.client()
    number = client.get_experiment_by_name("permafrost-variants").experiment_id
    (run,) = client.search_runs([number])
    assert client.list_artifacts(run.info.run_id, "filters/0")
    # Edited, params.yaml is no longer what the outputs were made with.
    (clone.folder / "mlflow.db").unlink()
    clone.change({"train": {"lr": 0.5}})
    clone.run("permafrost", "track")
    client = clone.client()
    number = client.get_experiment_by_name("permafrost").experiment_id
    rates = {str(record.params["train.lr"]) for record in whole.values()}
    assert {run.data.params["train.lr"] for run in client.search_runs([number])} == rates != {"0.5"}


def test_a_stage_that_logs_nothing_names_the_command(project: Project) -> None:
    for path in project.folder.glob("mlflow.db*"):
        path.unlink()
    for stage in ("train_first@0", "train_second@0", "tune", "sweep"):
        output = project.run("dvc", "repro", "-f", "--single-item", stage)
        assert stages_run(output) == [stage]
        assert output.count(UNLOGGED) == 1
    assert UNLOGGED not in project.run("permafrost", "sweep", PERMAFROST_FRESH="1")
    project.run("permafrost", "track")
    assert project.runs() == project.expected_runs()
    assert "0 runs written" in project.run("permafrost", "track")


def write_lock(folder: Path, text: str) -> Path:
    (folder / "metrics/train_first").mkdir(parents=True)
    record = {"key": "0" * 32, "kind": "first_task", "name": "first", "row": {"acc_task1": 0.5}}
    save_record(folder / "metrics/train_first/0.json", record)
    (folder / "dvc.lock").write_text(text)
    return folder


@pytest.mark.parametrize("text", ["", "[", "[1]", "stages: 3", "schema: '2.0'"])
def test_damaged_notes_of_dvc_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"dvc\.lock: "):
        runs_of_outputs(write_lock(tmp_path, text), set())


def test_parameters_of_another_version_are_named(tmp_path: Path) -> None:
    text = "stages: {train_first@0: {params: {params.yaml: {train: {epoch: 3}}}}}"
    with pytest.raises(InputError, match=r"dvc\.lock: train\.epoch: unknown key"):
        runs_of_outputs(write_lock(tmp_path, text), set())
    assert runs_of_outputs(tmp_path, {"0" * 32}) == []


def test_outputs_that_dvc_does_not_know_tell_nothing(tmp_path: Path) -> None:
    assert runs_of_outputs(write_lock(tmp_path, "stages: {}"), set()) == []
    (tmp_path / "dvc.lock").unlink()
    assert runs_of_outputs(tmp_path, set()) == []


def test_a_trial_that_diverged(tmp_path: Path) -> None:
    spec = {"strategy": "freeze", "seed": 0, "head": "shared", "metric": "mse", "pct": 0.5}
    trial = {"key": "1" * 32, **spec, "hyper": {}, "status": "failed", "error": "it diverged"}
    folder = write_lock(tmp_path, "stages: {tune: {params: {params.yaml: {seeds: [0]}}}}")
    save_record(folder / "metrics/trials.json", {"trials": [trial]})
    (run,) = runs_of_outputs(folder, set())
    assert (run.status, run.error, run.params["pct"]) == ("FAILED", "it diverged", 0.5)
    assert run.metrics == {}
