"""Good folders of images to be spoilt, small projects around them, and hostile names."""

import os
import socket
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from limits import no_hang
from permafrost.data import ImageDataset, load_dataset
from permafrost.errors import InputError
from small_data import put

SIZE = 8
COLOUR = (200, 100, 48)


def fill(root: Path) -> Path:
    """Write a good folder: the classes cat and dog, three images for training and one to test."""
    for part, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            for number in range(count):
                put(root / part / name / f"{number}.png")
    return root


def load(root: Path) -> ImageDataset:
    with no_hang():
        return load_dataset("image_folder", root, SIZE)


def refusal(name: str, root: Path) -> str:
    """Load in vain, and return the one line that says why."""
    try:
        with no_hang():
            load_dataset(name, root, SIZE)
    except InputError as error:
        line = str(error)
    else:
        raise AssertionError("was not refused")
    assert line.isprintable(), repr(line)
    assert line.startswith("split."), line
    return line


def refused(name: str, root: Path, *words: str) -> None:
    """Load in vain, and check what the refusal says; nothing may be written."""
    before = sorted(root.parent.rglob("*"))
    line = refusal(name, root)
    for word in words:
        assert word in line, f"{word!r} not in {line!r}"
    assert sorted(root.parent.rglob("*")) == before, "wrote files"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode: str = "RGB", colour: Any = COLOUR, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def broken(content: bytes, at: float, by: bytes = b"\xff\0\xff\0") -> bytes:
    place = int(len(content) * at)
    return content[:place] + by + content[place + len(by) :]


def small_project(folder: Path) -> Path:
    """Write as much of a project as `permafrost check` needs, with a good image folder."""
    for name in (".git", ".dvc"):
        (folder / name).mkdir(parents=True)
    (folder / "dvc.yaml").write_text("stages: {split: {cmd: permafrost split}}\n")
    (folder / "params.yaml").write_text(
        "seeds: [0]\nruntime: {device: cpu}\n"
        "split: {dataset: image_folder, root: data, classes_per_task: 2}\n"
    )
    for part, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog", "eel", "fly"):
            for number in range(count):
                put(folder / "data" / part / name / f"{number}.png")
    return folder


def make_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


# A slash ends a name: ∕ stands for it.
HOSTILE = [
    "<script>alert(1)<\u2215script>",
    "$(rm -rf ~)",
    r"$\frac{",
    "$x^2$",
    "a|b",
    "_x_",
    "**bold**",
    "`id`",
    "[a](javascript:alert(1))",
    "![a](http:x)",
    "&lt;b&gt;",
    "'; DROP TABLE runs; --",
    "{0}%s{name}",
    "-rf",
    "n" * 255,
    "é" * 127,
    "😀",
    "قطة",
    "猫",
    "CON",
    "a\\nb",
    "~",
    "null",
]
