"""Several at once: two `dvc repro`, a queue beside a sweep, hundreds of cells."""

from project import wait_for
from workflow import SMALL, WatchedProject, running_stage


def test_two_repros_at_once(tally, rounds, undisturbed, tmp_path):
    with tally("two dvc repro at once") as fault:
        for trial in range(rounds(1, 3)):
            with fault.trial(trial):
                project = WatchedProject(tmp_path / str(trial))
                first = project.start("dvc", "repro")
                assert running_stage(first, 60)
                output = project.run("dvc", "repro", code=255)
                assert "Traceback" not in output
                assert "another DVC process" in output or "is busy" in output, output
                assert first.wait(600) == 0
                first.communicate()
                assert project.bits() == undisturbed.bits
                project.run("permafrost", "track")
                assert project.runs() == project.expected_runs()


def test_queue_beside_a_sweep(tally, rounds, before_sweep, tmp_path):
    """Four workers of the queue write into one store while the workspace sweeps."""
    project = before_sweep.copy(tmp_path / "project")
    shares = [0.1, 0.3, 0.6, 0.9, 0.2, 0.4, 0.7, 0.8][: rounds(2, 8)]
    with tally("dvc exp run --queue, 4 workers, beside a sweep") as fault, fault.trial("queue"):
        cells = project.cells()
        listed = ",".join(str(share) for share in shares)
        project.run("dvc", "exp", "run", "--queue", "-S", f"freeze.pct={listed}")
        project.run("dvc", "queue", "start", "--jobs", "4")
        # Beside the queue, whose copies DVC has made; DVC's own lock is held for a moment only.
        project.run("permafrost", "sweep")
        rows = project.read("metrics/sweep.json")
        done = f"{len(shares)} of {len(shares)} queued runs"

        def finished() -> bool:
            return project.run("dvc", "queue", "status").count("Success") == len(shares)

        wait_for(finished, 600, done)
        assert {row["status"] for row in rows} == {"done"}
        own = {row["key"] for row in rows} - cells
        assert len(project.cells() - cells - own) == len(shares)
        project.run("permafrost", "track")
        assert project.runs() == project.expected_runs()


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
    with tally("a sweep of hundreds of cells, 4 workers") as fault, fault.trial(count):
        project.run("dvc", "repro")
        rows = project.read("metrics/sweep.json")
        assert len(rows) == count
        assert len({row["key"] for row in rows}) == count
        assert {row["status"] for row in rows} == {"done"}
        assert project.statuses()["FINISHED"] > count / 2  # logged while it ran
        project.run("permafrost", "track")
        assert project.runs() == project.expected_runs()
        assert "0 runs written" in project.run("permafrost", "track")
