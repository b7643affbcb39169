"""DVC's own notes: what a kill leaves of them is told and mended; nothing is trained again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dvc.exceptions import DvcException
from dvc.fs import localfs
from dvc.lock import LockError
from dvc.rwlock import rwlock
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils.serialize import load_yaml
from typer.testing import CliRunner
from voluptuous import Invalid

from permafrost import dvc_notes
from permafrost.cli import app
from permafrost.errors import InputError
from project import PLAIN_STAGES, Project, plain_project, stages_run, wait_for

COMMAND = "`permafrost doctor --repair`"
PART = ".Yk3nJzZ5hXhGm8vRgkQ9cN.tmp"  # as DVC calls an entry before it is whole


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = plain_project(tmp_path_factory.mktemp("made") / "project")
    project.run("dvc", "repro")
    return project


@pytest.fixture
def project(made: Project, tmp_path: Path) -> Project:
    return made.copy(tmp_path / "project")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with no more than DVC's notes, of which none is just being written."""
    monkeypatch.setattr(dvc_notes, "_MOMENT", 0)
    (tmp_path / ".dvc" / "tmp" / "exps" / "run" / "workspace").mkdir(parents=True)
    return tmp_path


def told(root: Path) -> str:
    """Return what a check tells of DVC's notes; nothing if they are whole."""
    try:
        dvc_notes.check_notes(root, repair=False)
    except InputError as error:
        return str(error)
    return ""


def cut_lock_file(folder: Path) -> Path:
    path = folder / "dvc.lock"
    path.write_text(path.read_text().rpartition("ts:")[0])  # "outs:" of the last stage
    return path


def cut_locks(folder: Path) -> Path:
    path = folder / ".dvc" / "tmp" / "rwlock"
    path.write_text('{"write": {"data/fir')
    return path


def unfinished_entries(folder: Path) -> Path:
    """Leave in the run cache what DVC had begun: a part, whole for a reader of YAML, or nothing."""
    (folder / "dvc.lock").unlink()
    part, other = (folder / ".dvc" / "cache" / "runs").glob("*/*/*")
    part.with_name(PART).write_text("cmd: cp params.yaml data/first && echo first >> ran\n")
    part.unlink()
    other.unlink()
    return part.with_name(PART)


DAMAGES = {
    cut_lock_file: [],
    cut_locks: [],
    unfinished_entries: ["first", "second"],  # there is nothing to restore them from
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_repro_goes_on_after_a_repair(project: Project, damage: Callable[[Path], Path]) -> None:
    path = damage(project.folder)
    (project.folder / "data" / "second").unlink()  # so that DVC has something to do
    project.run("dvc", "repro", code=255)
    message = told(project.folder)
    assert COMMAND in message
    assert "\n" not in message
    assert str(path) in project.run("permafrost", "doctor", "--repair", "--notes")
    assert not told(project.folder)
    (project.folder / "ran").unlink()
    assert stages_run(project.run("dvc", "repro")) == DAMAGES[damage]
    assert (project.folder / "ran").exists() == bool(DAMAGES[damage])
    assert (project.folder / "data" / "second").exists()


def test_a_repair_of_notes_is_quick(project: Project) -> None:
    code = "from permafrost.cli import app; app(['doctor', '--repair', '--notes'], 'permafrost', "
    code += "standalone_mode=False); import sys; print([*{'torch', 'mlflow'} & sys.modules.keys()])"
    assert project.run(sys.executable, "-c", code) == "[]\n"


def test_check_tells_the_file_and_the_command(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    path = cut_lock_file(project.folder)
    result = CliRunner().invoke(app, ["check"])
    line = f"permafrost: {path}: is cut off; {COMMAND} mends it\n"
    assert (result.exit_code, result.output) == (2, line)


def test_of_a_cut_lock_file_git_knows_the_rest(project: Project) -> None:
    """As after `dvc pull`, which brings no run cache."""
    project.commit("with dvc.lock")
    shutil.rmtree(project.folder / ".dvc" / "cache" / "runs")
    whole = (project.folder / "dvc.lock").read_text()
    (project.folder / "dvc.lock").write_text(whole[:100])
    dvc_notes.check_notes(project.folder, repair=True)
    assert (project.folder / "dvc.lock").read_text() == whole


def test_a_lock_file_is_told_wherever_dvc_refuses_it(root: Path, made: Project) -> None:
    whole = (made.folder / "dvc.lock").read_text()
    path = root / "dvc.lock"
    lines = [end for end, letter in enumerate(whole, start=1) if letter == "\n"]
    entries = load_yaml(made.folder / "dvc.lock")["stages"]
    refused = 0
    indented = {lines[1] + 1, lines[1] + 2}
    for end in sorted({0, 4, *range(5, len(whole), 131), *indented, *lines}):
        path.write_text(whole[:end])
        if not is_read_by_dvc(path):
            refused += 1
            assert str(path) in told(root), whole[:end]
        dvc_notes.check_notes(root, repair=True)
        if path.exists():
            assert is_read_by_dvc(path)
            assert load_yaml(path)["stages"].items() <= entries.items() or end in lines
    assert refused > 10
    assert not told(root)


def is_read_by_dvc(path: Path) -> bool:
    try:
        COMPILED_LOCKFILE_SCHEMA(load_yaml(path))
    except (DvcException, Invalid):
        return False
    return True


def test_what_no_kill_leaves_stays(root: Path, made: Project) -> None:
    whole = (made.folder / "dvc.lock").read_text()
    conflict = f"{whole}<<<<<<< HEAD\n  a:\n=======\n  b:\n>>>>>>> other\n"
    for text in (whole, conflict, "stages: {}\nschema: '2.0'\n", "by hand"):
        (root / "dvc.lock").write_text(text)
        assert not told(root)


def test_a_note_that_is_being_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / ".dvc" / "tmp" / "rwlock"
    path.write_text('{"wri')
    monkeypatch.setattr(dvc_notes.time, "sleep", lambda _: path.write_text("{}"))
    assert not told(root)


@pytest.mark.parametrize("name", ["rwlock", "exps/rwlock", "exps/run/workspace/workspace.run"])
@pytest.mark.parametrize("text", ["", "{", '{"write": {"a": {"pid": 1'])
def test_cut_json(root: Path, name: str, text: str) -> None:
    path = root / ".dvc" / "tmp" / name
    path.write_text(text)
    assert f"{path}: is cut off" in told(root)
    dvc_notes.check_notes(root, repair=True)
    assert not path.exists()


def test_whole_entries_of_the_run_cache_stay(root: Path) -> None:
    folder = root / ".dvc" / "cache" / "runs" / "ab" / ("ab" * 32)
    folder.mkdir(parents=True)
    for name in ("c" * 64, PART):
        (folder / name).write_text("cmd: a\n")
    dvc_notes.check_notes(root, repair=True)
    assert [path.name for path in folder.iterdir()] == ["c" * 64]


@pytest.fixture
def sleeper(root: Path) -> Iterator[Callable[..., int]]:
    """Return what starts a process with such arguments, and returns its number."""
    started = []

    def start(*arguments: str) -> int:
        command = [sys.executable, "-c", "import time; time.sleep(600)", *arguments]
        started.append(subprocess.Popen(command, cwd=root))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


def lock_outputs(root: Path, **holders: int) -> tuple[str, Path]:
    """Write a lock on an output for each process."""
    scratch = root / ".dvc" / "tmp"
    held = {name: {"pid": number, "cmd": "/bin/dvc repro"} for name, number in holders.items()}
    (scratch / "rwlock").write_text(json.dumps({"write": held, "read": {"in": [*held.values()]}}))
    return str(scratch), scratch / "rwlock"


def take(scratch: str, output: str) -> None:
    with rwlock(scratch, localfs, "dvc repro train", [], [output], False):
        pass


def test_a_lock_of_a_number_that_another_process_has(
    root: Path, sleeper: Callable[..., int]
) -> None:
    scratch, path = lock_outputs(root, out=sleeper(), more=os.getpid())
    with pytest.raises(LockError, match="is busy"):
        take(scratch, "out")
    assert f"{path}: has a lock of process" in told(root)
    dvc_notes.check_notes(root, repair=True)
    assert not told(root)
    take(scratch, "out")
    take(scratch, "more")


@pytest.mark.parametrize("arguments", [["dvc"], ["/bin/dvc", "repro"], ["x", "/bin/dvc repro"]])
def test_a_lock_of_dvc_stays(root: Path, sleeper: Callable[..., int], arguments: list[str]) -> None:
    lock_outputs(root, out=sleeper(*arguments))
    assert not told(root)


def test_a_lock_of_no_process_is_left_to_dvc(root: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    scratch, _ = lock_outputs(root, out=ended.pid)
    assert not told(root)
    take(scratch, "out")


def test_nothing_is_mended_while_dvc_is_at_work(project: Project) -> None:
    pipeline = project.folder / "dvc.yaml"
    pipeline.write_text(
        PLAIN_STAGES.replace("cp params.yaml", "echo begun > data/begun; sleep 600; cp")
    )
    process = project.start("dvc", "repro", "-f", start_new_session=True)
    path = project.folder / ".dvc" / "tmp" / "rwlock"
    try:
        wait_for((project.folder / "data" / "begun").exists, 300, "the first stage")
        held = path.read_text()
        assert str(process.pid) in held
        dvc_notes.check_notes(project.folder, repair=True)
        assert path.read_text() == held
        path.write_text('{"write": {"data/fir')
        with pytest.raises(InputError, match=f"DVC is at work here .*{process.pid}"):
            dvc_notes.check_notes(project.folder, repair=True)
        assert path.read_text() == '{"write": {"data/fir'
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
