"""Bad and odd image folders, and what `permafrost check` says of them."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hostile_data import (
    COLOUR,
    HOSTILE,
    encoded,
    fill,
    load,
    make_socket,
    plain,
    refusal,
    refused,
    small_project,
)
from limits import no_hang, no_rights, open_folder
from permafrost.cli import app
from small_data import put


def swap(root: Path, part: str, make: Callable[[Path], object]) -> None:
    """Put something else in a folder's place; the folder itself is then outside."""
    (root / part).rename(root.parent / "outside")
    make(root / part)


def add_class(root: Path, name: str | bytes, parts: tuple[str, ...] = ("train", "test")) -> None:
    for part in parts:
        folder = Path(os.fsdecode(os.fsencode(root / part) + b"/" + os.fsencode(name)))
        folder.mkdir()
        for number in range(2):
            (folder / f"{number}.png").write_bytes(encoded(plain(), "PNG"))


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


NFC, NFD = "caf\u00e9", "cafe\u0301"

# How a good folder is spoilt, and what the refusal must say.
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no train": (lambda r: (r / "train").rename(r / "training"), ["no folder train"]),
    "train in capitals": (lambda r: (r / "train").rename(r / "Train"), ["no folder train"]),
    "train that is a file": (lambda r: swap(r, "train", Path.touch), ["no folder train"]),
    "train that is a pipe": (lambda r: swap(r, "train", os.mkfifo), ["no folder train"]),
    "test that is a file": (lambda r: swap(r, "test", Path.touch), ["images/test", "folder"]),
    "test that is a pipe": (lambda r: swap(r, "test", os.mkfifo), ["images/test", "folder"]),
    "test that is a socket": (lambda r: swap(r, "test", make_socket), ["images/test", "folder"]),
    "an empty test": (lambda r: swap(r, "test", Path.mkdir), ["images/test", "no class folders"]),
    "images without classes": (
        lambda r: (swap(r, "train", Path.mkdir), put(r / "train/a.png")),
        ["images/train", "no class folders"],
    ),
    "only hidden classes": (
        lambda r: (swap(r, "train", Path.mkdir), put(r / "train/.cat/a.png")),
        ["images/train", "no class folders"],
    ),
    # Classes
    "an empty class": (lambda r: empty(r / "train/cat"), ["train/cat", "no images"]),
    "a class of hidden files": (
        lambda r: (empty(r / "test/dog"), (r / "test/dog/.DS_Store").touch()),
        ["test/dog", "no images"],
    ),
    "a class in train only": (lambda r: add_class(r, "eel", ("train",)), ["'eel'", "not in test"]),
    "a class in test only": (lambda r: add_class(r, "eel", ("test",)), ["'eel'", "not in train"]),
    "a class in another case": (
        lambda r: (r / "test/cat").rename(r / "test/Cat"),
        ["'Cat'", "the same classes in both"],
    ),
    "one name in two Unicode forms": (
        lambda r: (add_class(r, NFC), add_class(r, NFD)),
        ["two Unicode forms", r"'caf\xe9'", r"'cafe\u0301'"],
    ),
    "another form in test": (
        lambda r: (add_class(r, NFC, ("train",)), add_class(r, NFD, ("test",))),
        ["two Unicode forms", r"'caf\xe9'", r"'cafe\u0301'"],
    ),
    "text that turns right to left": (
        lambda r: add_class(r, "a\u202eb"),
        [r"\u202e", "control characters"],
    ),
    "a line break in a class": (lambda r: add_class(r, "a\nb"), [r"'a\nb'", "control characters"]),
    "a tab in a class": (lambda r: add_class(r, "a\tb"), [r"'a\tb'", "control characters"]),
    "an escape sequence in a class": (lambda r: add_class(r, "\x1b[2J"), [r"\x1b", "control"]),
    "a break of lines of Unicode": (lambda r: add_class(r, "a\u2028b"), [r"\u2028", "control"]),
    "a next line in a class": (lambda r: add_class(r, "a\x85b"), [r"\x85", "control"]),
    "a class that is no UTF-8": (lambda r: add_class(r, b"\xff\xfe"), [r"\udcff", "UTF-8"]),
    # What is no image
    "a folder in a class": (lambda r: (r / "train/cat/more").mkdir(), ["cat/more", "regular file"]),
    "a pipe in a class": (lambda r: os.mkfifo(r / "train/cat/pipe"), ["cat/pipe", "regular file"]),
    "a socket in a class": (
        lambda r: make_socket(r / "test/cat/socket"),
        ["cat/socket", "regular"],
    ),
    "a text in a class": (lambda r: (r / "test/dog/notes.txt").write_text("x"), ["dog/notes.txt"]),
    # Links
    "a link to a file outside": (
        lambda r: (r / "train/cat/a.png").symlink_to("/etc/hostname"),
        ["cat/a.png", "link to outside"],
    ),
    "a relative link outside": (
        lambda r: (put(r.parent / "a.png"), (r / "train/cat/a.png").symlink_to("../../../a.png")),
        ["cat/a.png", "link to outside"],
    ),
    "a link to endless zeros": (
        lambda r: (r / "train/cat/a.png").symlink_to("/dev/zero"),
        ["cat/a.png", "link to outside"],
    ),
    "a link over another to outside": (
        lambda r: ((r / "train/cat/a.png").symlink_to("b"), (r / "train/cat/b").symlink_to("/etc")),
        ["train/cat/", "link to outside"],
    ),
    "a link to a neighbour whose name begins alike": (
        lambda r: (put(r.parent / "images2/a.png"), (r / "train/eel").symlink_to("../../images2")),
        ["train/eel", "link to outside"],
    ),
    "a class that is a link outside": (
        lambda r: swap(r, "train/cat", lambda path: path.symlink_to(r.parent / "outside")),
        ["train/cat", "link to outside"],
    ),
    "a part that is a link outside": (
        lambda r: swap(r, "train", lambda path: path.symlink_to(r.parent / "outside")),
        ["images/train", "link to outside"],
    ),
    "test that is a link outside": (
        lambda r: swap(r, "test", lambda path: path.symlink_to(r.parent / "outside")),
        ["images/test", "link to outside"],
    ),
    "a broken link in a class": (
        lambda r: (r / "train/cat/a.png").symlink_to("nowhere"),
        ["cat/a.png", "link to nothing"],
    ),
    "a class that is a broken link": (
        lambda r: (r / "train/eel").symlink_to("nowhere"),
        ["train/eel", "link to nothing"],
    ),
    "a class that is a link to itself": (
        lambda r: (r / "train/eel").symlink_to("eel"),
        ["train/eel", "link to nothing"],
    ),
    "test that is a broken link": (
        lambda r: swap(r, "test", lambda path: path.symlink_to("nowhere")),
        ["images/test", "link to nothing"],
    ),
    "a class that is the folder above": (
        lambda r: (r / "train/eel").symlink_to("."),
        ["train/eel/", "regular file"],
    ),
    "a loop in a class": (
        lambda r: (r / "train/cat/a").symlink_to(".."),
        ["cat/a", "regular file"],
    ),
}


def test_bad_folders(tally, make):
    with tally("bad image folders") as fault:
        for name, (spoil, words) in BAD_FOLDERS.items():
            with fault.trial(name):
                root = make()
                spoil(root)
                refused("image_folder", root, *words)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
def test_device_in_a_class(tally, make):
    root = make()
    os.mknod(root / "train/cat/zero.png", 0o020666, os.makedev(1, 5))
    with tally("bad image folders") as fault, fault.trial("a device in a class"):
        refused("image_folder", root, "zero.png", "regular file")


RIGHTS = [(path, 0) for path in (".", "train", "train/cat", "test", "test/dog", "test/dog/0.png")]
RIGHTS += [(path, 0o444) for path in (".", "train", "test/dog")]  # listed, not entered


def test_without_rights(tally):
    with tally("bad image folders") as fault, open_folder() as parent:
        root = fill(parent / "images")
        for path, rights in RIGHTS:
            with fault.trial(f"{path} with {rights:o}"), no_rights(root / path, rights):
                line = refusal("image_folder", root)
                assert "PermissionError" in line, line
                assert str(root / path) in line, line


ROOTS: dict[str, Callable[[Path], Path]] = {
    "nothing": lambda folder: folder / "nowhere",
    "a file": lambda folder: folder / "images/train/cat/0.png",
    "a null device": lambda _: Path("/dev/null"),
    "too long a name": lambda folder: folder / ("x" * 300),
    "too long a path": lambda folder: folder / "/".join(["x" * 200] * 50),
    "a class": lambda folder: folder / "images/train/cat",
    "a file as a folder": lambda folder: folder / "images/train/cat/0.png/x",
}


def test_bad_roots(tally, make):
    with tally("bad image folders") as fault:
        for name, choose in ROOTS.items():
            with fault.trial(f"a root that is {name}"):
                assert "split.root" in refusal("image_folder", choose(make().parent))


def test_odd_folders(tally, make):
    with tally("odd image folders") as fault:
        with fault.trial("classes that differ in their case"):
            root = make()
            add_class(root, "Cat")
            assert load(root).class_names == ("Cat", "cat", "dog")
        with fault.trial("hidden folders, and files beside the classes"):
            root = make()
            (root / "train/.git").mkdir()
            (root / "train/.git/config").touch()
            (root / "train/cat/._0.png").write_bytes(b"\0\x05\x16\x07")
            (root / "train/README.txt").touch()
            os.mkfifo(root / "train/pipe")
            (root / "LICENCE").touch()
            data = load(root)
            assert (data.class_names, len(data.train)) == (("cat", "dog"), 6)
        with fault.trial("links within the folder"):
            root = make()
            (root / "more").mkdir()
            put(root / "more/a.png", plain())
            (root / "train/cat/a.png").symlink_to("../../more/a.png")
            (root / "train/eel").symlink_to(root / "more")
            (root / "test/eel").symlink_to("dog")
            data = load(root)
            assert data.class_names == ("cat", "dog", "eel")
            assert data.train.images[3, :, 0, 0].tolist() == list(COLOUR)
            assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
        with fault.trial("a root that is a link"):
            root = make()
            (root.parent / "link").symlink_to("images")
            assert len(load(root.parent / "link").train) == 6
        for name in HOSTILE:
            with fault.trial(f"a class named {name:.30}"):
                root = make()
                add_class(root, name)
                assert set(load(root).class_names) == {"cat", "dog", name}


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, str]]:
    """Run `permafrost check` in a small project."""

    def check() -> tuple[int, str]:
        monkeypatch.chdir(tmp_path / "project")
        with no_hang():
            result = CliRunner().invoke(app, ["check"])
        return result.exit_code, result.output

    small_project(tmp_path / "project")
    return check


def test_command(tally, checked, tmp_path):
    """What `permafrost check` prints is whole lines, whatever the names hold."""
    data = tmp_path / "project/data"
    with tally("bad image folders") as fault:
        with fault.trial("a good one"):
            code, line = checked()
            assert code == 0, line
            assert re.search(r"\n +1 +6 .*  cat, dog\n", line)
        with fault.trial("hostile class names, which are shown as they are"):
            for part in ("train", "test"):
                (data / part / "cat").rename(data / part / "$(rm -rf ~)")
            code, line = checked()
            assert code == 0, line
            assert re.search(r"\n +1 +6 .*  \$\(rm -rf ~\), dog\n", line)
            assert line.count("\n") == 6  # that the images have changed, and how long a run takes
        for name, spoil, words in (
            ("an image too few", lambda: empty_but_one(data / "train/dog"), ["'dog'", "too few"]),
            ("a line break", lambda: (data / "train/dog/a\nb").touch(), [r"a\nb", "no image"]),
            ("a class", lambda: (data / "train/a\x1b[2Jb").mkdir(), [r"\x1b[2J", "no images"]),
        ):
            with fault.trial(name):
                spoil()
                code, line = checked()
                assert code == 2, line
                assert line.startswith("permafrost: split.root: "), line
                assert line[:-1].isprintable()
                for word in words:
                    assert word in line, line


def empty_but_one(folder: Path) -> None:
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
