"""Bad input: one line that says what and where, exit code 2, no traceback, nothing written."""

import re
import shutil
from pathlib import Path

import pytest
import typer
from PIL import Image
from ruamel.yaml import YAML
from typer.testing import CliRunner

from permafrost import cli
from permafrost.cli import app
from project import STAGES, Project, command_of


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("bad") / "permafrost")


@pytest.fixture
def clone(original: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    original.run("git", "checkout", "-q", "--", ".")
    monkeypatch.chdir(original.folder)
    return original


def refusal(*command: str) -> str:
    """Run a command that has to be refused, and return its one line."""
    before = {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1, result.output
    assert result.output.startswith("permafrost: ")
    after = {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*") if path.is_file()}
    assert after == before
    return result.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"freeze": {"pct": 1.5}}, ["freeze.pct", "1.5", "less than or equal to 1"]),
        ({"split": {"tasks": 3}}, ["split.classes_per_task", "split.tasks", "10"]),
        ({"split": {"dataset": "image_folder", "root": "nowhere"}}, ["split.root", "nowhere"]),
        ({"split": {"dataset": "cifar100", "root": "params.yaml"}}, ["split.root", "folder"]),
    ],
)
def test_parameters(clone: Project, change: dict[str, object], words: list[str]) -> None:
    """What `check` alone sees; test_params.py has what a params.yaml by itself may not say."""
    clone.change(change)
    line = refusal("check")
    for word in words:
        assert word in line, line


def test_parameters_are_checked_by_every_stage(clone: Project) -> None:
    clone.change({"freeze": {"pct": 1.5}})
    for stage in STAGES:
        assert "freeze.pct" in refusal(*command_of(stage)[1:])


def test_missing_params_file(clone: Project) -> None:
    Path("params.yaml").unlink()
    assert "params.yaml: not found" in refusal("check")


def test_unknown_profile(clone: Project) -> None:
    known = "demo, methods, paper, photos, resnet-digits, sequence, split-digits, study, tables"
    assert known in refusal("profile", "papers")


def test_edited_parameters_are_not_overwritten(clone: Project) -> None:
    """Those of a test's project are edited."""
    line = refusal("profile", "tables")
    assert "params.yaml: has been edited; `permafrost profile tables --force`" in line
    for command in (["profile", "tables", "--force"], ["profile", "demo"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert Path("params.yaml").read_bytes() == Path("profiles/demo.yaml").read_bytes()
    Path("params.yaml").unlink()
    assert CliRunner().invoke(app, ["profile", "demo"]).exit_code == 0


@pytest.mark.parametrize("answer", ["n\n", "y\n"])
def test_edited_parameters_are_asked_for(
    clone: Project, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path("params.yaml").read_bytes()
    monkeypatch.setattr(cli, "_can_ask", lambda: True)
    result = CliRunner().invoke(app, ["profile", "tables"], input=answer)
    assert "Overwrite it?" in result.output
    assert (Path("params.yaml").read_bytes() == before) == (answer == "n\n")
    assert (result.exit_code == 0) == (answer == "y\n")


@pytest.mark.parametrize("key", ["seeds", "profile", "train", "split.tasks", "sweep.heads", "tune"])
def test_keys_that_dvc_looks_for(clone: Project, key: str) -> None:
    """Ours would be a default; DVC has none."""
    yaml, section = YAML(), key.split(".")[:-1]
    values = yaml.load(Path("params.yaml"))
    del (values[section[0]] if section else values)[key.split(".")[-1]]
    yaml.dump(values, Path("params.yaml"))
    assert f"params.yaml: has no {key}, which dvc.yaml reads" in refusal("check")


def test_empty_parameters(clone: Project) -> None:
    Path("params.yaml").write_text("{}\n")
    assert "which dvc.yaml reads; `permafrost profile`" in refusal("check")


def test_advice_outside_of_a_clone_leads_into_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("check", "profile", "doctor", "gc"):
        line = refusal(command)
        assert "clone" in line
        assert "permafrost profile" not in line


def test_copy_without_git(clone: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(clone.folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".git"))
    monkeypatch.chdir(tmp_path / "copy")
    assert "git" in refusal("check")


def test_outside_of_a_project(
    clone: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy("params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "no DVC project" in refusal("check")


def test_missing_inputs_of_a_stage(clone: Project) -> None:
    assert "data/tasks/0.safetensors: not found" in refusal("train_first", "--seed", "0")
    assert "models/path_integral/0.safetensors: not found" in refusal("consolidate", "--seed", "0")
    assert "metrics/tune.json: not found" in refusal("sweep")


@pytest.fixture
def photos(clone: Project) -> Path:
    root = clone.folder / "data/images"
    shutil.rmtree(root, ignore_errors=True)
    for part, count in (("train", 3), ("test", 1)):
        for name in "abcd":
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 36), (10 * index, ord(name), 99)).save(
                    folder / f"{index}.png"
                )
    clone.change({"split": {"dataset": "image_folder", "root": "data/images"}})
    clone.change({"split": {"classes_per_task": 2, "validation": 0.0}})
    return root


def test_good_image_folder(photos: Path) -> None:
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 0, result.output
    assert re.search(r"\n +1 +6 .*  a, b\n", result.output)


def test_file_that_is_no_image(photos: Path) -> None:
    (photos / "train/a/notes.txt").write_text("no image")
    assert "notes.txt" in refusal("check")


def test_class_with_too_few_images(photos: Path) -> None:
    for index in (1, 2):
        (photos / f"train/b/{index}.png").unlink()
    line = refusal("check")
    assert "'b'" in line
    assert "too few" in line


def test_more_classes_than_there_are(clone: Project, photos: Path) -> None:
    clone.change({"split": {"classes_per_task": 3}})
    assert "split.classes_per_task" in refusal("check")


def test_altered_archive(clone: Project) -> None:
    folder = clone.folder / "data/archives"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cifar-100-python.tar.gz").write_bytes(b"not the archive")
    clone.change({"split": {"dataset": "cifar100", "root": "data/archives"}})
    line = refusal("check")
    assert "cifar-100-python.tar.gz" in line
    assert "md5" in line
    shutil.rmtree(folder)


def test_download_without_network(clone: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    (clone.folder / "data").mkdir(exist_ok=True)
    clone.change({"split": {"dataset": "cifar100", "root": "data/archives"}})
    line = refusal("check")
    assert "cifar-100-python.tar.gz" in line
    assert "put it into" in line


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (MemoryError(), "this machine"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "this machine"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB."), "the GPU"),
    ],
)
def test_too_little_memory_is_told_in_a_line(
    error: Exception, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit), cli._clear_errors():
        raise error
    lower = "lower train.batch_size, model.width or sweep.workers"
    told = f"permafrost: {where} has too little free memory for that; {lower}\n"
    assert capsys.readouterr().err == told


def test_a_fault_of_the_program_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="a fault"), cli._clear_errors():
        raise RuntimeError("a fault")


def test_a_file_that_a_copy_would_lack_is_told(clone: Project) -> None:
    own = Path("custom/new.py")
    own.write_text("x = 1\n")
    try:
        result = CliRunner().invoke(app, ["check"])
        assert result.exit_code == 0
        assert "custom/new.py: unknown to git; `git add` it before" in result.output
        clone.run("git", "add", "custom/new.py")
        assert "unknown to git" not in CliRunner().invoke(app, ["check"]).output
    finally:
        clone.run("git", "rm", "-qf", "custom/new.py")
