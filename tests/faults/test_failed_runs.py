"""The workflow around a training that diverges."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from permafrost.artifacts import load_json
from permafrost.cli import app
from permafrost.stages import run_pool
from permafrost.tables import accuracy_table
from project import REPOSITORY, SEED_STAGES, TINY, Project, command_of, stages_run

# Without gradients too, weights grow hundredfold at every step.
DIVERGING = {"train": {"lr": 10.0, "weight_decay": 10.0}}
WEAK, STRONG = {"strength": 1.0}, {"strength": 1e12}
SWEEP = {"strategies": ["finetune", "freeze", "ewc"], "metrics": ["mse"], "pcts": [0.25]}
FAILED = "ewc strength 1e+12 shared seed 0"


@pytest.fixture
def workflow(tmp_path, monkeypatch):
    """Return a function that runs commands in a tiny project, after a change of parameters."""
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    yaml = YAML()
    params = yaml.load(REPOSITORY / "profiles" / "demo.yaml")

    def run(*commands, code=0, **sections):
        for name, section in sections.items():
            params[name] |= section
        yaml.dump(params, Path("params.yaml"))
        output = ""
        for command in commands:
            run_pool._inputs.cache_clear()  # as in a process of its own
            result = CliRunner().invoke(app, command_of(command)[1:])
            assert result.exit_code == code, result.output
            output += result.output
        return output

    params["seeds"] = [0]
    sections = {name: section for name, section in TINY.items() if name != "seeds"}
    run(**sections | {"rank": {"metrics": ["mse"]}, "sweep": SWEEP | {"workers": 1}})
    return run


def trained(folder="."):
    """Return the stored trainings, and when each was stored."""
    return {p: p.stat().st_mtime_ns for p in Path(folder).glob(".permafrost/cells/*/cell.json")}


def line_of(output, start):
    (line,) = [line for line in output.splitlines() if line.startswith(start)]
    return line


def check_failure(told, folder=Path()):
    """Check what is told of the one failed run, and the tables that show it."""
    count = "1 of 4 runs failed"
    assert told.startswith(f"permafrost: sweep: {count}: {FAILED} (task 2: the loss is ")
    assert "with train.lr=0.001); reports/tables.md shows them" in told
    text = (folder / "reports" / "tables.md").read_text()
    assert "| ewc (failed: 1 of 1 seeds) |" + " – |" * 4 + "\n" in text
    assert "| ewc | – | – | – |  |" in text
    assert re.search(rf"## Failed trainings\n.*\| {re.escape(FAILED)} \| task 2: ", text, re.S)
    for line in ("| finetune | ", "| freeze mse 50% | ", "| 25% | "):
        assert re.search(re.escape(line) + r"\d", text), line
    assert (folder / "reports" / "kept_and_learned.png").exists()


def test_a_failed_cell_in_the_workflow(tally, workflow):
    with tally("failed runs in the workflow") as fault:
        with fault.trial("one method diverges"):
            workflow(*SEED_STAGES, "evaluate", "stability", tune={"ewc": [STRONG]})
            output = workflow("tune", "sweep")
            assert "train.lr=0.001" in line_of(output, f"{FAILED} failed: task 2: ")
            workflow("report")
            check_failure(line_of(workflow("page", code=2), "permafrost: "))
            assert "page" in load_json(Path("reports/timings.json"))["stages"]
            assert "ewc" in Path("reports/index.html").read_text()
            rows = load_json(Path("metrics/sweep.json"))
            statuses = {row["strategy"]: row["status"] for row in rows}
            assert statuses == {"finetune": "done", "freeze": "done", "ewc": "failed"}
        with fault.trial("again: nothing is trained, the same is told"):
            before = trained()
            assert f"{FAILED} failed" in workflow("sweep")
            check_failure(line_of(workflow("page", code=2), "permafrost: "))
            assert trained() == before
            workflow("track")
        with fault.trial("mended"):
            output = workflow("tune", "sweep", "report", "page", tune={"ewc": [WEAK]})
            assert "runs failed" not in output
            assert "failed" not in Path("reports/tables.md").read_text()
        with fault.trial("one trial diverges"):
            grids = {"ewc": [STRONG, WEAK], "freeze": [{"pct": 0.25}, {"pct": 0.5}]}
            output = workflow("tune", tune=grids)
            assert "ewc: strength 1 (of 2, 1 diverged)" in output
            assert "freeze: pct 0.25 (of 2)" in output or "freeze: pct 0.5 (of 2)" in output
        with fault.trial("all trials diverge"):
            output = workflow("tune", code=2, tune=grids | {"ewc": [STRONG, {"strength": 1e11}]})
            assert output.count("\n") == 1
            assert output.startswith("permafrost: tune.ewc: every trial diverged")
        for stage, task in (("train_first", 1), ("train_second", 2)):
            with fault.trial(stage):
                for file in Path().glob(f"m*/{stage}/0.*"):
                    file.unlink()
                output = workflow(stage, code=2, **DIVERGING)
                assert output.count("\n") == 1
                assert output.startswith(f"permafrost: train: task {task}: ")
                assert output.endswith(" with train.lr=10.0; set a lower learning rate\n")
                assert not list(Path().glob(f"m*/{stage}/0.*"))
            workflow("train_first", train={"lr": 0.001, "weight_decay": 0.0})


def test_a_failed_cell_under_dvc(tally, rounds, tmp_path):
    if not rounds(0, 1):
        pytest.skip("takes minutes: in the long form")
    project = Project(tmp_path / "permafrost")
    rank, sweep = {"metrics": ["mse"]}, SWEEP | {"workers": 2}
    project.change({"rank": rank, "sweep": sweep, "tune": {"ewc": [STRONG]}})
    with tally("failed runs under DVC") as fault:
        with fault.trial("one method diverges"):
            output = project.run("dvc", "repro", code=255)
            check_failure(line_of(output, "permafrost: "), project.folder)
            assert "Traceback" not in output
        with fault.trial("again"):
            before = trained(project.folder)
            output = project.run("dvc", "repro", code=255)
            assert stages_run(output) == ["page"]
            check_failure(line_of(output, "permafrost: "), project.folder)
            assert trained(project.folder) == before
        with fault.trial("mended"):
            project.change({"tune": {"ewc": [WEAK]}})
            assert stages_run(project.run("dvc", "repro")) == ["tune", "sweep", "report", "page"]
            assert "failed" not in (project.folder / "reports" / "tables.md").read_text()
            assert len(trained(project.folder)) == len(before) + 1


def test_the_tables_say_of_how_many_seeds_a_line_is():
    good = {"acc_task1": 0.25, "acc_task2": 0.5, "acc_mean": 0.375, "forgetting": 0.125}
    rows = [good | {"status": "done"}, {"status": "failed"}, good | {"status": "done"}]
    table = accuracy_table(["method"], [(["ewc"], rows), (["si"], rows[1:2])], 2)
    mean, nothing = table.splitlines()[2:]
    assert mean.startswith("| ewc (failed: 1 of 3 seeds) | 25.0 (25.0 to 25.0) | 50.0 ")
    assert nothing == "| si (failed: 1 of 1 seeds) | – | – | – | – |"
