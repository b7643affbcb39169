"""What DVC notes is written as a whole, and read with sense after a kill."""

import errno
import os
import subprocess
import sys
from contextlib import suppress

import pytest
from dvc.fs import localfs
from dvc.lock import LockError
from dvc.rwlock import rwlock
from dvc.stage.cache import StageCache
from dvc.utils.serialize import dump_yaml

import permafrost_dvc


@pytest.fixture
def scratch(tmp_path):
    """Return the folder of a project where parts may lie."""
    folder = tmp_path / ".dvc" / "tmp"
    folder.mkdir(parents=True)
    return folder


def test_a_note_is_whole_or_the_old_one(tmp_path, scratch):
    path = tmp_path / "dvc.lock"
    path.write_text("old")
    path.chmod(0o600)
    with localfs.open(path, "w", encoding="utf-8") as file:
        file.write("new, ö")
        file.flush()
        assert path.read_text() == "old"
        assert len(list(scratch.iterdir())) == 1
    assert path.read_text() == "new, ö"
    assert path.stat().st_mode & 0o777 == 0o600
    with suppress(ZeroDivisionError), localfs.open(path, "w") as file:
        file.write("half")
        file.write(1 / 0)
    assert path.read_text() == "new, ö"
    dump_yaml(path, {"a": 1})
    assert path.read_text() == "a: 1\n"
    assert not list(scratch.iterdir())


def test_a_link_stays_one(tmp_path, scratch):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    dump_yaml(link, {"a": 1})
    assert link.is_symlink()
    assert path.read_text() == "a: 1\n"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY])
def test_a_note_on_another_disk(tmp_path, scratch, monkeypatch, number):
    def refuse(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    dump_yaml(tmp_path / "note", {"a": 1})
    assert (tmp_path / "note").read_text() == "a: 1\n"
    assert not list(scratch.iterdir())


def test_where_a_part_lies(tmp_path, scratch, monkeypatch):
    inner = tmp_path / "inner"
    (inner / ".dvc").mkdir(parents=True)
    assert permafrost_dvc._folder(f"{tmp_path}/a/b/c") == str(scratch)
    assert permafrost_dvc._folder(f"{inner}/c") == str(inner)  # not another project's
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert permafrost_dvc._folder(f"{tmp_path}/a/b/c") == f"{tmp_path}/a/b"


def test_a_lock_holds_as_long_as_its_dvc(scratch):
    """Not if its process was killed and another has its number now."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(sleep) as other, subprocess.Popen([*sleep, "dvc"]) as dvc:
        for number, blocks in ((other.pid, False), (os.getpid(), False), (dvc.pid, True)):
            (scratch / "rwlock").write_text(
                f'{{"write": {{"out": {{"pid": {number}, "cmd": "dvc repro train"}}}}}}'
            )
            arguments = (str(scratch), localfs, "dvc repro", ["out"], [], False)
            if blocks:
                with pytest.raises(LockError, match="is busy"), rwlock(*arguments):
                    pass
            else:
                with rwlock(*arguments):
                    pass
        other.kill()
        dvc.kill()


def test_the_run_cache_passes_over_what_is_no_entry(tmp_path):
    cache = object.__new__(StageCache)
    cache.cache_dir = str(tmp_path)
    key, entry = "ab" * 32, "c" * 64
    folder = tmp_path / "ab" / key
    folder.mkdir(parents=True)
    assert cache._load_cache(key, None) is None  # of an empty folder
    for name, found in ((".aaaa.tmp", False), ("bbbb.1.part", False), (entry, True)):
        (folder / name).write_text("cmd: a\n")
        assert (cache._load_cache(key, name) is not None) == found
