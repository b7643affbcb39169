"""No secret of MLflow's place is told or written, and its pages are served here only."""

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from mlflow_faults import free_port, serve, train_runs, unauthorized
from permafrost import maintenance
from permafrost.errors import InputError
from project import wait_for

pytestmark = pytest.mark.workflow


def test_no_secret_is_told_or_written(tally, make_root, monkeypatch, capfd):
    secrets = ("s3cr3t", "t0k3n", "dXNlcjpzM2NyM3Q=")  # the last is user:s3cr3t, as HTTP sends it
    with tally("MLflow refuses a password") as fault, serve(unauthorized) as (uri, _):
        place = uri.removeprefix("http://")
        for case, address, variables in (
            ("in the URI", f"http://user:s3cr3t@{place}", {}),
            ("in variables", uri, {"USERNAME": "user", "PASSWORD": "s3cr3t"}),
            ("a token", uri, {"TOKEN": "t0k3n"}),
            ("to a database", "postgresql://user:s3cr3t@127.0.0.1:9/db", {}),
            ("to a host", "http://user:s3cr3t@nowhere.invalid", {}),
        ):
            with fault.trial(case):
                root = make_root(address)
                for name in ("USERNAME", "PASSWORD", "TOKEN"):
                    monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
                for name, value in variables.items():
                    monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
                monkeypatch.setattr(maintenance, "project_root", lambda root=root: root)
                train_runs(root, [0])
                texts = list(capfd.readouterr())
                assert "the training goes on" in texts[1]
                for command in (maintenance.track_all, lambda: maintenance.serve_ui(1)):
                    with pytest.raises(InputError) as caught:
                        command()
                    texts.append(str(caught.value))
                texts += [path.name for path in root.rglob("*")]
                texts += [
                    path.read_text(errors="replace") for path in root.rglob("*") if path.is_file()
                ]
                assert not [text for text in texts if any(s in text for s in secrets)]


def test_the_ui_hides_its_store_and_listens_here_only(rounds, make_root, fresh):
    if not rounds(0, 1):
        pytest.skip("only in the long form")
    root, port = make_root(), free_port()
    shutil.copy(fresh, root / "mlflow.db")
    shutil.copy(Path(__file__).parents[2] / "params.yaml", root)
    (root / "dvc.yaml").touch()
    script = "import os, sys; from permafrost import maintenance; from pathlib import Path;"
    script += "maintenance.project_root = lambda: Path.cwd();"
    script += f"sys.exit(maintenance.serve_ui({port}))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.DEVNULL, start_new_session=True
    )

    def answers():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        wait_for(answers, 120, "the UI's start")
        servers = psutil.Process(process.pid).children(recursive=True)
        commands = [" ".join(server.cmdline()) for server in servers]
        assert any("uvicorn" in command for command in commands)
        assert not [command for command in commands if "mlflow.db" in command]
        listening = [
            line.split()[1]
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
            if line.split()[3] == "0A"
        ]
        assert [place for place in listening if place.endswith(f":{port:04X}")] == [
            f"0100007F:{port:04X}"
        ]
        assert not Path("/proc/net/tcp6").read_text().count(f":{port:04X} 0000")
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name"
        with urllib.request.urlopen(f"{url}?experiment_name=permafrost") as answer:
            assert json.loads(answer.read())["experiment"]["name"] == "permafrost"
    finally:
        process.terminate()
        process.wait(30)
