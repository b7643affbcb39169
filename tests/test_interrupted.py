"""A `dvc exp run` that is killed: git goes back to its branch, and nothing is lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from permafrost.errors import InputError
from permafrost.interrupted import check_git, tell_interrupted
from project import PLAIN_STAGES, Project, plain_project, wait_for

NOTES = "refs/exps/exec"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a project with an edit of the user's, and then an experiment that got SIGTERM."""
    project = plain_project(tmp_path_factory.mktemp("killed") / "project")
    stages = PLAIN_STAGES.replace(
        "cp data/first",
        "echo experiment > metrics/variant.json; echo begun > data/begun; sleep 600; cp data/first",
    )
    (project.folder / "metrics/variant.json").write_text("committed\n")
    (project.folder / "dvc.yaml").write_text(stages)
    project.commit("a long stage")
    with (project.folder / "CITATION.cff").open("a") as file:
        file.write("# edited before\n")
    process = project.start("dvc", "exp", "run", "-S", "train.epochs=7", start_new_session=True)
    try:
        wait_for((project.folder / "data" / "begun").exists, 300, "the second stage")
        process.terminate()
        process.wait(60)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return project


@pytest.fixture
def project(killed: Project, tmp_path: Path) -> Project:
    return killed.copy(tmp_path / "project")


def state(project: Project) -> tuple[str, ...]:
    """Return all that git shows of a project."""
    commands = (["status", "--porcelain", "-b"], ["for-each-ref"], ["diff", "HEAD"])
    return tuple(project.run("git", *command) for command in commands)


def kept_branch(project: Project) -> str:
    names = project.run("git", "for-each-ref", "--format=%(refname:short)", "refs/heads")
    return names.split()[0]


def test_back_on_its_branch(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    lock = (project.folder / "dvc.lock").read_text()
    assert project.run("git", "branch", "--show-current") == ""
    line = tell_interrupted(project.folder)
    assert "left the branch main" in line
    assert "`permafrost doctor --repair` goes back" in line
    with pytest.raises(InputError) as refusal:
        check_git(project.folder, repair=False)
    assert str(refusal.value) == line
    check_git(project.folder, repair=True)
    name = kept_branch(project)
    assert name.startswith("interrupted-")
    assert capsys.readouterr().err.count(name) == 1
    status = project.run("git", "status", "--porcelain", "-b").splitlines()
    assert status == ["## main", " M CITATION.cff", "?? dvc.lock", "?? ran"]
    assert "# edited before" in (project.folder / "CITATION.cff").read_text()
    assert (project.folder / "dvc.lock").read_text() == lock
    assert (project.folder / "metrics/variant.json").read_text() == "committed\n"
    kept = [
        project.run("git", "show", f"{name}:{file}") for file in ("params.yaml", "CITATION.cff")
    ]
    assert "epochs: 7" in kept[0]
    assert "# edited before" in kept[1]
    assert project.run("git", "show", f"{name}:dvc.lock") == lock
    assert project.run("git", "show", f"{name}:metrics/variant.json") == "experiment\n"
    assert "BASELINE" not in project.run("git", "for-each-ref", NOTES)
    before = state(project)
    check_git(project.folder, repair=True)
    assert state(project) == before
    project.run("dvc", "exp", "show")


def test_commits_and_edits_made_meanwhile(project: Project) -> None:
    citation, readme = project.folder / "CITATION.cff", project.folder / "README.md"
    readme.write_text("committed meanwhile\n")
    project.run("git", "commit", "-q", "-m", "meanwhile", "README.md")
    commit = project.run("git", "rev-parse", "HEAD").strip()
    citation.write_text("edited meanwhile\n")
    check_git(project.folder, repair=True)
    name = kept_branch(project)
    assert project.run("git", "branch", "--show-current") == "main\n"
    assert readme.read_text() != "committed meanwhile\n"
    assert citation.read_text() == "edited meanwhile\n"
    assert project.run("git", "show", f"{name}:README.md") == "committed meanwhile\n"
    assert project.run("git", "show", f"{name}:CITATION.cff") == "edited meanwhile\n"
    project.run("git", "merge-base", "--is-ancestor", commit, name)


def test_what_git_refuses_is_kept_where_it_is(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both the branch and the files have another README.md than the commit made meanwhile."""
    readme = project.folder / "README.md"
    readme.write_text("committed meanwhile\n")
    project.run("git", "commit", "-q", "-m", "meanwhile", "README.md")
    readme.write_text("edited meanwhile\n")
    with pytest.raises(InputError, match=r"git switch: error: .*README\.md"):
        check_git(project.folder, repair=True)
    assert readme.read_text() == "edited meanwhile\n"
    assert kept_branch(project) in capsys.readouterr().err
    assert "left the branch main" in tell_interrupted(project.folder)


def step_elsewhere(project: Project) -> None:
    project.run("git", "checkout", "-q", "--detach", "HEAD")
    project.run("git", "stash", "-q")
    project.run("git", "checkout", "-q", "HEAD~1")


def forget_log(project: Project) -> None:
    (project.folder / ".git" / "logs" / "HEAD").unlink()


def rename_branch(project: Project) -> None:
    project.run("git", "branch", "-m", "main", "other")


@pytest.mark.parametrize("change", [step_elsewhere, forget_log, rename_branch])
def test_without_proof_it_says_what_to_do(
    project: Project, change: Callable[[Project], None]
) -> None:
    change(project)
    before = state(project)
    with pytest.raises(InputError) as refusal:
        check_git(project.folder, repair=True)
    for command in ("git switch -c NAME", "git commit -am edits", "git switch BRANCH"):
        assert command in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert state(project) == before


def test_no_interrupted_experiment(project: Project) -> None:
    """HEAD may be off a branch because somebody wants it so."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", "dvc"]
    with subprocess.Popen(command, cwd=project.folder) as dvc:
        assert not tell_interrupted(project.folder)  # it is still at work
        dvc.kill()
    assert tell_interrupted(project.folder)
    project.run("git", "update-ref", "-d", f"{NOTES}/EXEC_BASELINE")
    assert not tell_interrupted(project.folder)
