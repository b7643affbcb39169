"""The same bits in every clone, with any number of workers, in any order, from scratch or not."""

import copy

import pytest

from workflow import SMALL, WatchedProject

pytestmark = pytest.mark.workflow


def variation(**sweep) -> dict:
    """Return the small project's parameters with another sweep."""
    changed = copy.deepcopy(SMALL)
    changed["sweep"] |= sweep
    return changed


def test_same_bits(tally, rounds, undisturbed, tmp_path):
    clones = {
        "one worker": variation(workers=1),
        "another clone": variation(),
        "four workers": variation(workers=4),
    }
    with tally("another clone, another number of workers") as fault:
        for name, changes in list(clones.items())[: rounds(1, 3)]:
            with fault.trial(name):
                project = WatchedProject(tmp_path / name.replace(" ", "_"), changes)
                project.run("dvc", "repro")
                assert project.bits() == undisturbed.bits


def test_same_bits_with_several_threads(tally, rounds, tmp_path):
    if not rounds(0, 1):
        pytest.skip("only in the long form")
    with tally("two clones, two threads a training") as fault, fault.trial("twice"):
        bits = []
        for name in ("one", "other"):
            project = WatchedProject(tmp_path / name)
            project.change({"runtime": {"threads": 2}})
            project.run("dvc", "repro")
            bits.append(project.bits())
        assert bits[0] == bits[1]


def test_cells_in_another_order(tally, before_sweep, tmp_path):
    """The rows come in the order of the params; each is the same to the last bit."""
    projects = [before_sweep.copy(tmp_path / name) for name in ("one", "other")]
    strategies = SMALL["sweep"]["strategies"]
    projects[1].change({"sweep": {"strategies": strategies[::-1], "workers": 1}})
    with tally("the sweep's runs in another order") as fault, fault.trial("reversed"):
        rows = []
        for project in projects:
            project.run("permafrost", "sweep")
            rows.append({row["key"]: row for row in project.read("metrics/sweep.json")})
        assert rows[0] == rows[1]
        assert list(rows[0]) == list(rows[1])[::-1]
        weights = [
            {path.parent.name: path.read_bytes() for path in project.folder.glob(pattern)}
            for project in projects
            for pattern in [".permafrost/cells/*/model.safetensors"]
        ]
        assert weights[0] == weights[1]


def test_rebuild_from_scratch(tally, undisturbed, before_sweep, tmp_path):
    project = before_sweep.copy(tmp_path / "project")
    before = project.epochs()
    with tally("PERMAFROST_FRESH=1 dvc repro -f") as fault, fault.trial("rebuilt"):
        project.run("dvc", "repro", "-f", PERMAFROST_FRESH="1")
        assert project.bits() == undisturbed.bits
        # The variant is a run of the sweep, and both stages train it.
        assert sum((project.epochs() - before).values()) >= sum(undisturbed.epochs.values())


def test_the_same_bits_whatever_ran_before(tally, before_sweep, tmp_path):
    """Here by a parameter that changes no training: chance ranks, so no picture counts."""
    project = before_sweep.copy(tmp_path / "project")
    project.change({"freeze": {"metric": "random"}})
    project.run("dvc", "repro", "evaluate")
    project.change({"visualize": {"steps": 3}})
    with tally("a project with a history") as fault, fault.trial("other pictures"):
        project.run("dvc", "repro", "evaluate")
        bits = project.bits()
        project.run("dvc", "repro", "-f", "evaluate", PERMAFROST_FRESH="1")
        assert project.bits() == bits
