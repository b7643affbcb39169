"""The library without DVC and MLflow, which are installed for the workflow alone."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from permafrost.cli import app
from permafrost.tracking import RUNS, RunRecord, Tracker

REMEDY = 'is not installed; `pip install "permafrost-cl[workflow]"` adds it'
LIBRARY = """
import os, sys

sys.modules |= dict.fromkeys(["dvc", "mlflow", "psutil"])  # as if they were not installed

import permafrost.data, permafrost.evaluation, permafrost.explain, permafrost.freezing
import permafrost.models, permafrost.ranking, permafrost.strategies, permafrost.training
from permafrost.cli import app

app(["init", "new"], standalone_mode=False)
os.chdir("new")
app(["profile", "tables"], standalone_mode=False)
app(["--help"])
"""


def test_the_library_needs_neither_dvc_nor_mlflow(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", LIBRARY], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("command", "library"),
    [("check", "dvc"), ("doctor", "dvc"), ("gc", "dvc"), ("track", "mlflow"), ("ui", "mlflow")],
)
def test_commands_say_how_to_get_what_they_need(
    monkeypatch: pytest.MonkeyPatch, command: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 2
    assert result.output == f"permafrost: {library} {REMEDY}\n"


def test_a_training_goes_on_without_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    Tracker(tmp_path).write(RunRecord("key", RUNS, "a run"))
    told = f"MLflow at sqlite:///{tmp_path}/mlflow.db: mlflow {REMEDY}; the training goes on"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
