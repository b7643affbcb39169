"""Several at once: two `dvc repro`, a queue beside a sweep, hundreds of runs."""

import subprocess
from contextlib import suppress

import psutil
import pytest

from mlflow_faults import WRONG, never, serve
from project import wait_for
from workflow import SMALL, WatchedProject, running_stage

pytestmark = pytest.mark.workflow


def test_two_repros_at_once(tally, rounds, undisturbed, tmp_path):
    with tally("two dvc repro at once") as fault:
        for trial in range(rounds(1, 3)):
            with fault.trial(trial):
                project = WatchedProject(tmp_path / str(trial))
                first = project.start("dvc", "repro")
                assert running_stage(first, 60)
                second = project.start("dvc", "repro")
                outputs = {p.communicate(timeout=900)[0]: p.returncode for p in (first, second)}
                # Between two stages of the first, the second may win.
                assert sorted(outputs.values()) == [0, 255], outputs
                (refused,) = (output for output, code in outputs.items() if code)
                assert "Traceback" not in "".join(outputs)
                assert "another DVC process" in refused or "is busy" in refused, refused
                assert project.bits() == undisturbed.bits
                project.run("permafrost", "track")
                assert project.runs() == project.expected_runs()


def test_queue_beside_a_sweep(tally, rounds, before_sweep, tmp_path):
    """Four workers of the queue write into one store while the workspace sweeps."""
    if not rounds(0, 1):
        pytest.skip("a queue by itself is tried in tests/workflow; this one in the long form")
    project = before_sweep.copy(tmp_path / "project")
    shares = [0.1, 0.3, 0.6, 0.9, 0.2, 0.4, 0.7, 0.8][: rounds(2, 8)]
    with tally("dvc exp run --queue, 4 workers, beside a sweep") as fault, fault.trial("queue"):
        runs = project.cells()
        listed = ",".join(str(share) for share in shares)
        project.run("dvc", "exp", "run", "--queue", "-S", f"freeze.pct={listed}")
        _start_queue(project)

        def finished() -> bool:
            status = project.run("dvc", "queue", "status")
            assert "Failed" not in status
            return status.count("Success") == len(shares)

        wait_for(lambda: _running_stages(project) > 1, 120, "two queued runs at once")
        # Beside the queue, whose copies DVC has made; DVC's own lock is held for a moment only.
        project.run("permafrost", "sweep")
        assert not finished(), "the queue had ended before the sweep"
        rows = project.read("metrics/sweep.json")
        wait_for(finished, 1200, "the end of the queue")
        assert {row["status"] for row in rows} == {"done"}
        own = {row["key"] for row in rows} - runs
        assert len(project.cells() - runs - own) == len(shares)
        project.run("permafrost", "track")
        assert project.runs() == project.expected_runs()


def _start_queue(project: WatchedProject) -> None:
    """Not through a pipe, which the workers would hold open until they end."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = ["dvc", "queue", "start", "--jobs", "4"]
    subprocess.run(command, cwd=project.folder, env=project.environment, check=True, **quiet)


def _running_stages(project: WatchedProject) -> int:
    """Count them without DVC, which would be kept from its work by being asked."""
    with suppress(psutil.NoSuchProcess):
        return sum("/permafrost" in " ".join(p.cmdline()[:2]) for p in project.processes())
    return 0


def test_hundreds_of_cells(tally, rounds, tmp_path):
    count = rounds(30, 300)
    metrics = ["mse", "random", "magnitude"]
    sweep = {
        "strategies": ["freeze"],
        "metrics": metrics,
        "pcts": [round((step + 1) / 100, 2) for step in range(count // len(metrics))],
        "workers": 4,
    }
    changes = SMALL | {"train": {"epochs": 1}, "sweep": sweep, "rank": {"metrics": metrics}}
    changes["tune"] = {"freeze": [{"pct": sweep["pcts"][0]}]}
    project = WatchedProject(tmp_path / "project", changes)
    with tally("a sweep of hundreds of runs, 4 workers") as fault, fault.trial(count):
        project.run("dvc", "repro")
        rows = project.read("metrics/sweep.json")
        assert len(rows) == count
        assert len({row["key"] for row in rows}) == count
        assert {row["status"] for row in rows} == {"done"}
        assert project.statuses()["FINISHED"] > count / 2  # logged while it ran
        project.run("permafrost", "track")
        assert project.runs() == project.expected_runs()
        assert "0 runs written" in project.run("permafrost", "track")


def test_a_whole_run_without_its_server(tally, rounds, undisturbed, tmp_path):
    """Told once by each process that logs; another store gets everything later."""
    servers = {"hangs": never, "answers 500": WRONG["500"]}
    with tally("MLflow's server fails for a whole dvc repro") as fault:
        for case, answer in list(servers.items())[: rounds(1, 2)]:
            with fault.trial(case), serve(answer) as (uri, _):
                project = WatchedProject(tmp_path / case.replace(" ", "_"))
                output = project.run("dvc", "repro", MLFLOW_TRACKING_URI=uri)
                # train_first, train_second, evaluate, report, and one or both of sweep's workers
                assert output.count("the training goes on") in (5, 6), output
                assert project.bits() == undisturbed.bits
                assert not (project.folder / "mlflow.db").exists()
                project.run("permafrost", "track")
                assert project.runs() == project.expected_runs()
