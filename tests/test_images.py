"""Images are watched by what they hold, wherever they lie."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML
from typer.testing import CliRunner

from permafrost.cli import app
from project import Project, stages_run


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (value, 99, 50)).save(path, format="BMP")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images outside of the project."""
    root = tmp_path_factory.mktemp("outside") / "images"
    for part, count in (("train", 3), ("test", 1)):
        for place, name in enumerate("abcd"):
            for index in range(count):
                picture(root / part / name / f"{index}.bmp", 10 * place + index)
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, outside: Path) -> Project:
    """Return a project whose images have been split."""
    project = Project(tmp_path_factory.mktemp("project") / "permafrost")
    project.change({"split": {"dataset": "image_folder", "root": str(outside)}})
    project.change({"split": {"classes_per_task": 2, "validation": 0.0}})
    project.run("dvc", "repro", "split@0")
    project.commit("images")
    return project


def repro(project: Project) -> list[str]:
    return stages_run(project.run("dvc", "repro", "split@0"))


def check(project: Project) -> str:
    return project.run("permafrost", "check")


def test_second_repro_runs_no_stage(project: Project) -> None:
    assert "changed" not in check(project)
    assert repro(project) == []
    assert project.run("git", "status", "--porcelain") == ""


def test_changed_picture_of_the_same_size_and_time(project: Project, outside: Path) -> None:
    path = outside / "train/a/0.bmp"
    check(project)
    before, content = path.stat(), path.read_bytes()
    tasks = (project.folder / "data/tasks/0.safetensors").read_bytes()
    picture(path, 200)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert path.read_bytes() != content
    assert "the images have changed; `dvc repro`" in check(project)
    assert repro(project) == ["split@0"]
    assert (project.folder / "data/tasks/0.safetensors").read_bytes() != tasks
    assert "changed" not in check(project)
    # As it was: nothing has to be made that DVC still has.
    path.write_bytes(content)
    check(project)
    assert repro(project) == []
    assert (project.folder / "data/tasks/0.safetensors").read_bytes() == tasks


def test_touched_and_renamed_files_change_nothing(project: Project, outside: Path) -> None:
    for path in (outside / "train/a").iterdir():
        os.utime(path)
    (outside / "train/a/2.bmp").rename(outside / "train/a/3.bmp")  # still the last one
    assert "changed" not in check(project)
    assert repro(project) == []
    (outside / "train/a/3.bmp").rename(outside / "train/a/2.bmp")


def test_renamed_file_that_changes_the_order(project: Project, outside: Path) -> None:
    (outside / "train/a/2.bmp").rename(outside / "train/a/-.bmp")
    assert "changed" in check(project)
    assert repro(project) == ["split@0"]
    (outside / "train/a/-.bmp").rename(outside / "train/a/2.bmp")
    check(project)
    assert repro(project) == []


def test_added_file_and_class(project: Project, outside: Path) -> None:
    for name in ("a/9.bmp", "e/0.bmp", "e/1.bmp", "e/2.bmp"):
        picture(outside / "train" / name, 77)
    picture(outside / "test/e/0.bmp", 77)
    assert "changed" in check(project)
    assert repro(project) == ["split@0"]
    for path in (outside / "train/a/9.bmp", outside / "train/e", outside / "test/e"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    check(project)
    assert repro(project) == []


def test_stage_notes_what_it_reads_without_a_check(project: Project, outside: Path) -> None:
    path = outside / "train/b/0.bmp"
    content = path.read_bytes()
    picture(path, 201)
    assert stages_run(project.run("dvc", "repro", "-f", "-s", "split@0")) == ["split@0"]
    assert "changed" not in check(project)
    assert repro(project) == []
    path.write_bytes(content)
    check(project)
    assert repro(project) == []


def test_relative_folder_in_a_temporary_copy(project: Project, outside: Path) -> None:
    """The copy has no images of its own."""
    shutil.copytree(outside, project.folder / "data/images")
    project.change({"split": {"root": "data/images"}})
    project.run("dvc", "repro", "split@0")
    noted = (project.folder / "images.yaml").read_text()
    picture(project.folder / "data/images/train/a/0.bmp", 150)
    project.run("dvc", "exp", "run", "--temp", "-f", "-n", "changed", "split@0")
    assert (project.folder / "images.yaml").read_text() == noted
    (ref,) = project.run("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()
    (project.folder / "images.yaml").write_text(project.run("git", "show", f"{ref}:images.yaml"))
    assert "changed" not in check(project)
    shutil.rmtree(project.folder / "data/images")
    project.run("git", "checkout", "-q", "--", ".")
    assert repro(project) == []


def test_clone_without_the_images(project: Project, outside: Path, tmp_path: Path) -> None:
    shutil.copytree(project.folder, tmp_path / "clone", symlinks=True)
    shutil.rmtree(tmp_path / "clone" / ".permafrost")
    clone = Project.__new__(Project)
    clone.folder, clone.seen = tmp_path / "clone", set()
    outside.rename(outside.with_name("away"))
    assert "is not here; what it held is in data/tasks" in check(clone)
    assert repro(clone) == []
    shutil.rmtree(clone.folder / "data/tasks")
    assert "no folder train" in clone.run("permafrost", "check", code=2)
    outside.with_name("away").rename(outside)


def test_data_sets_of_fixed_content_need_no_hash(project: Project, outside: Path) -> None:
    project.change({"split": {"dataset": "digits", "root": None}})
    check(project)
    assert YAML(typ="safe").load(project.folder / "images.yaml") == {
        "sha256": None,
        "weights": None,
    }
    project.run("git", "checkout", "-q", "--", ".")


def test_junk_of_systems_is_passed_over(
    project: Project, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    junk = ["train/a/Thumbs.db", "train/Desktop.ini", "train/b/.DS_Store", "train/b/desktop.ini"]
    junk += ["train/__MACOSX/a/._0.bmp", "test/a/@eaDir/0.bmp"]
    for name in junk:
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_bytes(b"junk")
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 0, result.output
    assert "changed" not in result.output
    (outside / "train/a/notes.txt").write_text("ours")
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 2
    assert "notes.txt" in result.output
    for name in (*junk, "train/a/notes.txt"):
        (outside / name).unlink()
    shutil.rmtree(outside / "train/__MACOSX")
    shutil.rmtree(outside / "test/a/@eaDir")
