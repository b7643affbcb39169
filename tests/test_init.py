"""The files of a new project, from a clone and from an installed package."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML
from typer.testing import CliRunner

import permafrost
from permafrost.cli import app
from permafrost.errors import InputError
from permafrost.init import write_project
from permafrost.stages.shared import VERSION, open_stage
from project import REPOSITORY


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stages_of(folder: Path) -> Any:
    return YAML(typ="safe").load(folder / "dvc.yaml")["stages"]


@pytest.fixture
def new_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new project, in which the test works."""
    folder = tmp_path / "new"
    write_project(folder)
    monkeypatch.chdir(folder)
    return folder


def test_a_new_project_has_the_files_of_the_repository(new_project: Path) -> None:
    files = contents(new_project)
    assert files.pop("params.yaml") == files["profiles/demo.yaml"]
    assert files.pop("Makefile") == (REPOSITORY / "workflow.mk").read_bytes()
    assert files.pop("permafrost.version").decode() == f"{permafrost.__version__}\n"
    assert {"dvc.yaml", "images.yaml", ".gitignore", ".dvcignore"} < files.keys()
    assert "custom/centre_distance.py" in files
    del files["dvc.yaml"]
    assert files == {name: (REPOSITORY / name).read_bytes() for name in files}


def test_its_stages_depend_on_the_version_instead_of_the_source(new_project: Path) -> None:
    assert "src/permafrost" not in (new_project / "dvc.yaml").read_text()
    stages, originals = stages_of(new_project), stages_of(REPOSITORY)
    for name, stage in originals.items():
        others = [dep for dep in stage["deps"] if not dep.startswith("src/")]
        assert sorted(stages[name]["deps"]) == sorted([str(VERSION), *others])
        assert stages[name] | {"deps": stage["deps"]} == stage


def test_dvc_reads_it(new_project: Path) -> None:
    with Repo.init(str(new_project), no_scm=True) as repo:
        names = {stage.addressing.partition("@")[0] for stage in repo.index.stages}
    assert names == stages_of(REPOSITORY).keys()


@pytest.mark.parametrize("name", ["dvc.yaml", "custom/centre_distance.py"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    result = CliRunner().invoke(app, ["init", str(tmp_path)])
    assert result.exit_code == 2
    assert (
        result.output == f"permafrost: {tmp_path / name}: is there already; choose another folder\n"
    )
    assert contents(tmp_path) == {name: b"mine"}


def test_it_says_what_comes_next(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("of a repository that is there already")
    result = CliRunner().invoke(app, ["init", str(tmp_path)])
    assert result.exit_code == 0
    assert f"cd {tmp_path}\n  git init && dvc init\n" in result.output


def test_another_version_is_refused_until_check_renews_it(new_project: Path) -> None:
    VERSION.write_text("0.0.1\n")
    told = f"permafrost.version: names 0.0.1, but {permafrost.__version__} runs; `permafrost check`"
    with pytest.raises(InputError, match=told), open_stage("split", 0):
        pass
    Repo.init(str(new_project), no_scm=True).close()
    subprocess.run(["git", "init", "-q"], check=True)
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 0, result.output
    with open_stage("split", 0):
        pass


def test_the_wheel_has_what_a_new_project_needs(tmp_path: Path, new_project: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        str(tmp_path / "dist"),
    ]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    subprocess.run(
        [sys.executable, "-m", "permafrost", "init", "other"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        check=True,
    )
    assert contents(tmp_path / "other") == contents(new_project)
