"""The command line's own answers."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

import permafrost
from permafrost.cli import app
from project import REPOSITORY


def test_version_is_the_same_everywhere() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.output == f"permafrost {permafrost.__version__}\n"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == permafrost.__version__
    citation = YAML(typ="safe").load(REPOSITORY / "CITATION.cff")
    assert citation["version"] == permafrost.__version__


def test_version_of_a_tree_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "permafrost").symlink_to(REPOSITORY / "src/permafrost")
    others = os.pathsep.join(path for path in sys.path if not path.endswith("src"))
    result = subprocess.run(
        [sys.executable, "-S", "-m", "permafrost", "--version"],  # -S: no installed packages
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{others}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"permafrost {permafrost.__version__}\n"


@pytest.mark.parametrize("command", [[], ["gc"], ["doctor"], ["check"], ["rank"]])
def test_help_shows_no_type_of_what_takes_no_value(command: list[str]) -> None:
    output = CliRunner().invoke(app, [*command, "--help"]).output
    assert "--help" in output
    assert "bool" not in output.lower()


def test_tables_fit_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    missing = CliRunner().invoke(app, ["tables"])
    assert (missing.exit_code, missing.output.count("\n")) == (2, 1)
    assert "reports/tables.md" in missing.output
    cells = " | ".join(["91.3 (71.2 to 97.8)"] * 6)
    text = f"# Results\n\n| {' | '.join('abcdef')} |\n{'| --- ' * 6}|\n| {cells} |\n"
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/tables.md").write_text(text)
    monkeypatch.setenv("COLUMNS", "100")
    printed = CliRunner().invoke(app, ["tables"]).output
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.count("91.3") == 6
    assert "|" not in printed


def test_types_are_there_for_others() -> None:
    assert (Path(permafrost.__file__).parent / "py.typed").exists()
