"""A full disk, damaged files, folders that nobody may write into."""

import os
import random
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from permafrost.artifacts import load_record, save_record
from permafrost.errors import InputError
from permafrost.runs.store import Outcome, RunRequest, RunStore
from permafrost.tensors import load_tensors, save_tasks
from project import STAGES, command_of
from workflow import WatchedProject, check_recovered, disk_usage, remove

pytestmark = pytest.mark.workflow

MIB = 2**20


@contextmanager
def small_disk(folder: Path, mebibytes: int):
    """Mount a file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Write a file that leaves so many bytes free."""
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    subprocess.run(["fallocate", "-l", str(free - leave), str(ballast)], check=True)
    return ballast


def test_full_disk(tally, rounds, undisturbed, tmp_path):
    with (
        small_disk(tmp_path / "disk", 192) as disk,
        tally("disk full in some stage of dvc repro") as fault,
    ):
        draw = random.Random(0)
        count = rounds(1, 10)
        for index in range(count):
            project = WatchedProject(disk / "project")
            # From nearly none to nearly all that it needs.
            leave = int(0.95 * undisturbed.disk * (index + draw.random()) / count)
            with fault.trial(f"{leave / MIB:.2f} MiB free"):
                fault.lost(_fill_and_recover(project, undisturbed, disk, leave))
            (disk / "ballast").unlink(missing_ok=True)
            remove(project.folder)


def _fill_and_recover(project, undisturbed, disk, leave):
    ballast = fill(disk, leave)
    process = project.start("dvc", "repro")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, "the disk was large enough"
    assert "Traceback" not in output, output
    told = ("No space left on device", "disk is full", "database or disk is full")
    assert any(text in output for text in told), output
    assert not list(project.folder.rglob("*.part")), "half-written files are left"
    ballast.unlink()
    project.run("permafrost", "doctor", "--repair", "--notes")  # DVC's have an end only with space
    project.run("dvc", "repro")
    project.run("permafrost", "track")  # MLflow had no space either
    return check_recovered(project, undisturbed, trainings=2)


def test_full_disk_in_each_stage(tally, rounds, undisturbed, before_sweep, tmp_path):
    with (
        small_disk(tmp_path / "disk", 192) as disk,
        tally("disk full in a given stage") as fault,
    ):
        project = before_sweep.copy(disk / "project")
        project.run("dvc", "repro")
        for stage in STAGES[:: rounds(5, 1)]:
            ballast = fill(disk, 0)
            with fault.trial(stage):
                output = project.run(*command_of(stage), code=2)
                assert "No space left on device" in output
                assert "Traceback" not in output
                assert not list(project.folder.rglob("*.part")), "half-written files are left"
            ballast.unlink()
        with fault.trial("with space again"):
            fault.lost(check_recovered(project, undisturbed, trainings=0))


def flipped(content: bytes, position: int) -> bytes:
    """Return the content with one bit changed."""
    changed = bytearray(content)
    changed[position] ^= 1 << position % 8
    return bytes(changed)


def damages(content: bytes, count: int) -> list[bytes]:
    """Return the content with one bit flipped, or cut short, at positions all over it."""
    draw = random.Random(0)
    places = [draw.randrange(len(content)) for _ in range(count)]
    return [flipped(content, at) if index % 3 else content[:at] for index, at in enumerate(places)]


def test_every_damaged_tensor_file_is_refused(tally, rounds, tmp_path, make_sequence):
    path = tmp_path / "tasks.safetensors"
    save_tasks(path, make_sequence())
    with tally("bit flipped in, or end cut off, a tensor file") as fault:
        for index, damage in enumerate(damages(path.read_bytes(), rounds(200, 2000))):
            with fault.trial(index):
                path.write_bytes(damage)
                with pytest.raises(InputError, match=str(path)):
                    load_tensors(path)


def test_every_damaged_record_is_refused_or_the_same(tally, rounds, tmp_path):
    """A bit may turn a space into another one, which changes nothing."""
    path = tmp_path / "rows.json"
    rows = [{"key": "a", "acc": 0.25, "none": None}, {"key": "b", "acc": 1e-9, "R": [[0.1]]}]
    save_record(path, rows)
    with tally("bit flipped in, or end cut off, a file of results") as fault:
        for index, damage in enumerate(damages(path.read_bytes(), rounds(200, 2000))):
            with fault.trial(index):
                path.write_bytes(damage)
                assert _same_or_refused(path, rows)


def _same_or_refused(path: Path, rows: list[dict]) -> bool:
    try:
        return load_record(path) == rows
    except InputError as error:
        return str(path) in str(error)


def test_damaged_files_of_a_project(tally, rounds, undisturbed, before_sweep, tmp_path):
    """Each is named and refused or made again, whatever DVC believes of it."""
    project = before_sweep.copy(tmp_path / "project")
    project.run("dvc", "repro")
    whole = project.bits()
    assert whole == undisturbed.bits
    names = sorted(whole)[:: rounds(6, 1)]
    with tally("damaged file in models/ or metrics/ that DVC takes for whole") as fault:
        for number, name in enumerate(names):
            with fault.trial(name):
                _damage_unseen(project.folder / name, cut=number % 2 == 1)
                output = project.run("permafrost", "doctor", code=2)
                assert name in output
                project.run("permafrost", "doctor", "--repair")
                assert not (project.folder / name).exists()
                project.run("dvc", "repro")
                assert project.bits() == whole
    with tally("damaged file in DVC's cache") as fault:
        for name in ("models/rank/0.safetensors", "metrics/sweep.json")[: rounds(1, 2)]:
            with fault.trial(name):
                _damage_cached(project, name)
                (project.folder / name).unlink()
                project.run("dvc", "repro")  # takes the damaged copy
                assert name in project.run("permafrost", "doctor", code=2)
                project.run("permafrost", "doctor", "--repair")
                project.run("dvc", "repro")
                assert project.bits() == whole


def test_damaged_files_of_the_store(tally, before_sweep, tmp_path):
    project = before_sweep.copy(tmp_path / "project")
    (variant,) = project.folder.glob(".permafrost/variants/*/variant.json")
    with tally("damaged file of the store") as fault, fault.trial("a variant's summary"):
        _damage_unseen(variant)
        assert str(variant) in project.run("permafrost", "track", code=2)
        assert str(variant) in project.run("permafrost", "doctor", code=2)
        project.run("permafrost", "doctor", "--repair")
        project.run("permafrost", "track")
        project.run("dvc", "repro", "-f", "--single-item", "evaluate")
        assert variant.exists()
    with tally("damaged file of the store") as fault, fault.trial("the timings"):
        timings = project.folder / "reports/timings.json"
        for content in ('{"stages": ', "[1]", "null", '{"stages": 3}'):
            timings.write_text(content)
            project.run("permafrost", "evaluate")
            assert "evaluate" in project.read("reports/timings.json")["stages"]


def test_damaged_cells_of_a_sweep(tally, rounds, undisturbed, before_sweep, tmp_path):
    """Each is told and trained again, also in a process of the pool."""
    project = before_sweep.copy(tmp_path / "project")
    project.run("dvc", "repro")
    keys = [row["key"] for row in project.read("metrics/sweep.json")]
    files = [f".permafrost/cells/{key}/{file}" for file in CELL_FILES for key in keys]
    with tally("damaged file of a run of the sweep") as fault:
        for number, name in enumerate(files[:: rounds(6, 1)]):
            with fault.trial(name):
                _damage_unseen(project.folder / name, cut=number % 2 == 1)
                output = project.run("permafrost", "sweep")
                (told,) = (line for line in output.splitlines() if f"{name}: " in line)
                assert told.endswith("; it is made again")
                assert project.bits() == undisturbed.bits
        with fault.trial("MLflow"):
            assert project.runs() == project.expected_runs()


CELL_FILES = ("cell.json", "model.safetensors", "kept.safetensors")


def _damage_unseen(path: Path, *, cut: bool = False) -> None:
    """Flip a bit so that neither size nor time of the file tells; or cut its end off."""
    before = path.stat()
    content = path.read_bytes()
    path.chmod(0o644)
    middle = len(content) // 2
    path.write_bytes(content[:middle] if cut else flipped(content, middle))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _damage_cached(project: WatchedProject, name: str) -> None:
    content = (project.folder / name).read_bytes()
    (cached,) = (
        path
        for path in project.folder.glob(".dvc/cache/files/md5/*/*")
        if path.is_file() and path.read_bytes() == content
    )
    cached.chmod(0o644)
    cached.write_bytes(flipped(content, len(content) // 2))
    cached.chmod(0o444)


def test_a_stage_refuses_damaged_input(tally, rounds, before_sweep, tmp_path):
    project = before_sweep.copy(tmp_path / "project")
    readers = {
        "data/tasks/0.safetensors": "train_first",
        "models/train_first/0.safetensors": "saliency",
        "models/path_integral/0.safetensors": "consolidate",
        "models/saliency/0.safetensors": "rank",
        "models/visualize/0.safetensors": "rank",
        "models/rank/0.safetensors": "freeze",
        "models/freeze/0.json": "train_second",
        "models/consolidate/0.safetensors": "sweep",
        "metrics/tune.json": "sweep",
        "metrics/train_second/0.json": "evaluate",
    }
    with tally("stage given a damaged file") as fault:
        for name, stage in list(readers.items())[:: rounds(4, 1)]:
            path = project.folder / name
            content = path.read_bytes()
            _damage_unseen(path)
            with fault.trial(name):
                output = project.run(*command_of(stage), code=2)
                assert output.count("\n") == 1, output
                assert name in output
            path.write_bytes(content)


def test_folders_that_cannot_be_written_are_named(tally, before_sweep, tmp_path):
    """By a file in the folder's place: the superuser may write into any folder."""
    project = before_sweep.copy(tmp_path / "project")
    with tally("folder that cannot be written") as fault:
        for name, command in (
            (".permafrost/cells", ["train_first", "--seed", "0"]),
            ("models/rank", ["rank", "--seed", "0"]),
            ("reports/visualize/0", ["visualize", "--seed", "0"]),
        ):
            folder = project.folder / name
            shutil.rmtree(folder)
            folder.write_text("in the way")
            with fault.trial(name):
                output = project.run("permafrost", *command, code=2)
                assert name in output
                assert "Traceback" not in output
            folder.unlink()


def test_a_read_only_disk_is_named(tally, before_sweep, tmp_path):
    with (
        small_disk(tmp_path / "disk", 192) as disk,
        tally("folder that cannot be written") as fault,
    ):
        project = before_sweep.copy(disk / "project")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for command, place in (
            (["rank", "--seed", "0"], "models/rank"),
            (["sweep"], f"{project.folder}/.permafrost"),
            (["doctor", "--repair"], f"{project.folder}/.permafrost"),
            (["track"], f"{project.folder}/.permafrost"),
        ):
            with fault.trial(f"read-only disk, {command[0]}"):
                output = project.run("permafrost", *command, code=2)
                assert "Traceback" not in output
                assert output.splitlines()[-1].startswith(f"permafrost: {place}")
                assert "Read-only file system" in output


def test_a_full_disk_leaves_no_half_cell(tally, tmp_path, make_network):
    """Whichever write of a run fails, it is not taken for done."""
    request = RunRequest("cell", "cell", {"a": 1}, {}, ())
    weights = make_network().state_dict()
    outcome = Outcome({"row": {"acc": 0.5}, "history": []}, weights, 1.0)
    with (
        small_disk(tmp_path / "disk", 16) as disk,
        tally("disk full while a training is stored") as fault,
    ):
        store, done = RunStore(disk), []
        assert _stored(store, request.key, outcome)
        size = disk_usage(disk)
        for share in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.1):
            shutil.rmtree(store.folder)
            store.folder.mkdir()
            ballast = fill(disk, int(share * size))
            with fault.trial(f"room for {share:.0%}"):
                done.append(_stored(store, request.key, outcome))
                if done[-1]:
                    assert store.is_whole(request.key)
                else:
                    assert store.load(request.key) is None
                assert not list(store.folder.rglob("*.part"))
            ballast.unlink()
        assert done[-1]
        assert done.count(False) >= 4, done


def _stored(store: RunStore, key: str, outcome: Outcome) -> bool:
    try:
        store._complete(key, {"key": key}, outcome, {})
    except OSError as error:
        if not str(error.filename).startswith(str(store.folder)):
            raise
        return False
    return True
