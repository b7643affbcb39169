"""Bad and odd image folders and archives, and names that want to be markup."""

import os
import pickle
import socket
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from limits import check_with_little_memory, no_hang, no_rights, open_folder
from permafrost.cli import app
from permafrost.data import ImageDataset, load_dataset
from permafrost.errors import InputError
from permafrost.evaluation import Interval
from permafrost.params import Params
from permafrost.pictures import draw_best_and_worst, draw_saliency, draw_trade_off
from permafrost.ranking import Evidence
from permafrost.stages.report import tables
from permafrost.tables import escape, markdown
from project import Project
from test_datasets import SmallCifar, pack, put

SIZE = 8
COLOUR = (200, 100, 48)


def fill(root: Path) -> Path:
    """Write a good folder: the classes cat and dog, three images for training and one to test."""
    for part, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            for number in range(count):
                put(root / part / name / f"{number}.png")
    return root


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], Path]:
    """Return a builder of good folders, each in a new parent that is outside of it."""
    made = []

    def build() -> Path:
        made.append(tmp_path / str(len(made)) / "images")
        return fill(made[-1])

    return build


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


# Images -----------------------------------------------------------------------------------------


def png(
    width: int, height: int, depth: int, kind: int, raw: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """Return a PNG of any depth and colour type; each of its rows holds the same bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    rows = zlib.compress((b"\0" + raw) * (height if raw else 1))
    body = b"".join(chunk(*item) for item in (*chunks, (b"IDAT", rows), (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode: str = "RGB", colour: Any = COLOUR, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def frames(kind: str, **options: Any) -> bytes:
    others = [plain(colour=(0, 0, 255)), plain(colour=(0, 255, 0))]
    return encoded(plain(), kind, save_all=True, append_images=others, **options)


def with_exif(content: bytes) -> bytes:
    return encoded(plain(), "JPEG", quality=95, exif=b"Exif\0\0" + content)


def orientation(value: bytes, kind: int = 3) -> bytes:
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", 0x112, kind, 1, value) + bytes(4)


GREY = (128, 128, 128)
WIDE = (2, 2, 2, 2)
PALETTE = plain().convert("P", palette=Image.Palette.ADAPTIVE)
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("comment", "x" * 100_000)

# The content of a file, and the colour that its image becomes.
ODD_IMAGES: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "PNG": (encoded(plain(), "PNG"), COLOUR),
    "JPEG": (encoded(plain(), "JPEG", quality=95), COLOUR),
    "progressive JPEG": (encoded(plain(), "JPEG", quality=95, progressive=True), COLOUR),
    "JPEG with garbage behind it": (encoded(plain(), "JPEG", quality=95) + b"x" * 99, COLOUR),
    "grey JPEG": (encoded(plain("L", 128), "JPEG"), GREY),
    "CMYK JPEG": (encoded(plain("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "CMYK TIFF": (encoded(plain("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "LAB TIFF": (encoded(plain("LAB", (255, 128, 128)), "TIFF"), (255, 255, 255)),
    "1-bit PNG": (encoded(plain("1", 1), "PNG"), (255, 255, 255)),
    "1-bit BMP": (encoded(plain("1", 1), "BMP"), (255, 255, 255)),
    "2-bit grey PNG": (png(8, 8, 2, 0, b"\xaa\xaa"), (170, 170, 170)),
    "4-bit grey PNG": (png(8, 8, 4, 0, b"\x88" * 4), (136, 136, 136)),
    "grey PNG": (encoded(plain("L", 128), "PNG"), GREY),
    "16-bit grey PNG": (png(8, 8, 16, 0, b"\x80\x80" * 8), GREY),
    "16-bit RGB PNG": (png(8, 8, 16, 2, b"\xc8\xc8\x64\x64\x30\x30" * 8), COLOUR),
    "16-bit RGBA PNG": (png(8, 8, 16, 6, (b"\xc8\xc8\x64\x64\x30\x30" + b"\xff\xff") * 8), COLOUR),
    "16-bit grey PNG with alpha": (png(8, 8, 16, 4, b"\x80\x80\xff\xff" * 8), GREY),
    "16-bit grey TIFF": (encoded(Image.fromarray(np.full((8, 8), 0x8080, "u2")), "TIFF"), GREY),
    "16-bit grey PPM": (b"P5 8 8 65535\n" + b"\x80\x80" * 64, GREY),
    "PPM in letters": (b"P3 1 1 255\n200 100 48\n", COLOUR),
    "PPM with a comment": (b"P6 # hello\n1 1 255\n" + bytes(COLOUR), COLOUR),
    "palette PNG": (encoded(PALETTE, "PNG"), COLOUR),
    "palette PNG with a transparent colour": (
        encoded(PALETTE, "PNG", transparency=PALETTE.getpixel((0, 0))),
        (0, 0, 0),
    ),
    "RGB PNG with a transparent colour": (encoded(plain(), "PNG", transparency=COLOUR), (0, 0, 0)),
    "grey PNG with a transparent colour": (encoded(plain("L", 7), "PNG", transparency=7), (0,) * 3),
    "grey PNG with alpha": (encoded(plain("LA", (255, 128)), "PNG"), GREY),
    "RGBA PNG": (encoded(plain("RGBA", (*COLOUR, 255)), "PNG"), COLOUR),
    "wholly transparent PNG": (encoded(plain("RGBA", (*COLOUR, 0)), "PNG"), (0, 0, 0)),
    "transparent WebP": (encoded(plain("RGBA", (*COLOUR, 0)), "WEBP", lossless=True), (0, 0, 0)),
    "animated GIF": (frames("GIF"), COLOUR),
    "animated WebP": (frames("WEBP", lossless=True), COLOUR),
    "animated PNG": (frames("PNG"), COLOUR),
    "TIFF of several pages": (frames("TIFF"), COLOUR),
    "GIF of 500 frames": (
        encoded(plain(), "GIF", save_all=True, append_images=[plain(), plain("L", 9)] * 250),
        COLOUR,
    ),
    "1 x 1": (encoded(plain(size=(1, 1)), "PNG"), COLOUR),
    "1 x 10000": (encoded(plain(size=(1, 10_000)), "PNG"), COLOUR),
    "10000 x 1": (encoded(plain(size=(10_000, 1)), "PNG"), COLOUR),
    "EXIF of nothing": (with_exif(b""), COLOUR),
    "EXIF of garbage": (with_exif(b"garbage" * 9), COLOUR),
    "EXIF cut short": (with_exif(b"II*\0\x08\0\0\0\xff\xff\x12"), COLOUR),
    "EXIF that leads nowhere": (with_exif(b"II*\0\xff\xff\xff\x7f"), COLOUR),
    "EXIF that leads to itself": (with_exif(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"), COLOUR),
    "EXIF with an unknown orientation": (with_exif(orientation(b"\x63\0\0\0")), COLOUR),
    "EXIF with an orientation in letters": (with_exif(orientation(b"up\0\0", kind=2)), COLOUR),
    "EXIF with a good orientation": (with_exif(orientation(b"\x06\0\0\0")), COLOUR),
    "PNG with a broken colour profile": (encoded(plain(), "PNG", icc_profile=b"x" * 50), COLOUR),
    "PNG with a long comment": (encoded(plain(), "PNG", pnginfo=TEXT), COLOUR),
    "PNG with an unknown chunk": (
        png(8, 8, 8, 2, bytes(COLOUR) * 8, (b"evIl", b"x" * 99)),
        COLOUR,
    ),
}

# The name of a file: all are read by their content.
ODD_NAMES = [
    "a.jpg",
    "a",
    "A.PNG.exe",
    "a\nb.png",
    "a\r\x1b[31m\x07.png",
    "a'b\"c`d.png",
    "$(rm -rf ~).png",
    "<script>alert(1)</script>.png".replace("/", "\u2215"),
    "-rf.png",
    "--help",
    "a..b.png",
    "a b\t.png",
    "a%s{0}%n.png",
    "x" * 251 + ".png",
    "caf\u00e9.png",
    "cafe\u0301.png",
    "\u202egnp.png",
    "قطة.png",
    "😀.png",
    os.fsdecode(b"\xff\xfe.png"),
]


def test_odd_images(tally, make):
    with tally("odd images") as fault:
        for name, (content, colour) in ODD_IMAGES.items():
            with fault.trial(name):
                root = make()
                (root / "train/cat/a").write_bytes(content)
                became = load(root).train.images[3].int()
                expected = torch.tensor(colour)[:, None, None]
                assert (became - expected).abs().max() <= 4, became[:, 4, 4].tolist()


def test_odd_file_names(tally, make):
    with tally("odd names of files") as fault:
        for name in ODD_NAMES:
            with fault.trial(ascii(name)):
                root = make()
                path = root / "train/cat" / name
                path.write_bytes(encoded(plain(), "PNG"))
                images = load(root).train.images
                assert (images[:4, :, 0, 0] == torch.tensor(COLOUR)).all(1).sum() == 1
                path.write_bytes(b"no image")
                refused("image_folder", root, "train/cat", "no image that can be read")


def claims(width: int, height: int) -> dict[str, bytes]:
    """Return headers, of formats without the pixels, that claim a size."""
    short = struct.pack("<HH", min(width, 65535), min(height, 65535))
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (279, 9))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return {
        "PNG": png(width, height, 8, 2, b""),
        "GIF": b"GIF89a" + short + b"\x80\0\0" + bytes(6) + b",\0\0\0\0" + short + b"\0\x02\0;",
        "BMP": b"BM"
        + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, width, height, 1, 24, *WIDE, 0, 0),
        "TIFF": b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4),
        "PPM": b"P6 %d %d 255\n" % (width, height),
    }


def broken(content: bytes, at: float, by: bytes = b"\xff\0\xff\0") -> bytes:
    place = int(len(content) * at)
    return content[:place] + by + content[place + len(by) :]


NOISE = Image.fromarray(np.random.RandomState(0).randint(256, size=(64, 64, 3)).astype(np.uint8))
NOISY = {kind: encoded(NOISE, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")}

BAD_IMAGES: dict[str, bytes] = {
    "no bytes": b"",
    "one byte": b"\x89",
    "zeros": bytes(5000),
    "text": b"no image\n",
    "a web page": b"<!doctype html><title>404</title>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touch ran) system\n",
    "PDF": b"%PDF-1.7\n",
    "an archive": b"PK\x03\x04" + bytes(99),
    "a pickle": pickle.dumps(np.zeros((8, 8, 3), np.uint8)),
    "an icon": encoded(plain(size=(16, 16)), "ICO"),
    "JPEG 2000": encoded(plain(), "JPEG2000"),
    "a thumbnail of Windows": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(999),
    "floating point": encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
    "negative integers": encoded(Image.fromarray(np.full((8, 8), -1, np.int32)), "TIFF"),
    "PNG of no pixels": png(0, 0, 8, 2, b""),
    "PNG of no width": png(0, 8, 8, 2, b""),
    "PNG without pixels": png(8, 8, 8, 2, b""),
    "PNG of unknown depth": png(8, 8, 7, 2, bytes(24)),
    "PNG whose comment is a bomb": png(
        8, 8, 8, 2, bytes(24), (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
    ),
    "PNG whose pixels are garbage": broken(NOISY["PNG"], 0.5),
    "PNG whose header is garbage": broken(NOISY["PNG"], 0.001, b"\0" * 40),
    "TIFF whose header is garbage": broken(NOISY["TIFF"], 0, b"II*\0\xff\xff\xff\xff"),
    "BMP whose header is garbage": broken(NOISY["BMP"], 0, b"BM" + b"\xff" * 40),
    **{f"{kind} cut to a half": content[: len(content) // 2] for kind, content in NOISY.items()},
    **{f"{kind} cut to 20 bytes": content[:20] for kind, content in NOISY.items()},
    **{f"{kind} of 9000 x 9000 that has no pixels": c for kind, c in claims(9000, 9000).items()},
}


def test_bad_images(tally, make):
    with tally("bad images") as fault:
        for name, content in BAD_IMAGES.items():
            with fault.trial(name):
                root = make()
                (root / "test/dog/a.png").write_bytes(content)
                refused("image_folder", root, "test/dog/a.png", "no image that can be read")


def test_decompression_bombs(tally, tmp_path):
    bombs = claims(20_000, 20_000) | {
        "PNG with its pixels": png(20_000, 20_000, 1, 0, bytes(2500)),
        "long PNG": png(1, 2**31 - 1, 8, 2, b""),
        "largest PNG": png(2**31 - 1, 2**31 - 1, 8, 2, b""),
    }
    folders = []
    for name, content in bombs.items():
        folders.append(small_project(tmp_path / name))
        (folders[-1] / "data/train/cat/a.png").write_bytes(content)
    answers = check_with_little_memory(folders, megabytes=200)
    with tally("decompression bombs, 200 MB to spare") as fault:
        for name, (code, line) in zip(bombs, answers, strict=True):
            with fault.trial(name):
                assert code == 2, line
                assert line.startswith("permafrost: split.root: ")
                assert "too many pixels" in line, line
                assert line[:-1].isprintable()


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


# Folders ----------------------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


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
            assert "task 1 cat, dog: 6 training" in line
        with fault.trial("hostile class names, which are shown as they are"):
            for part in ("train", "test"):
                (data / part / "cat").rename(data / part / "$(rm -rf ~)")
            code, line = checked()
            assert code == 0, line
            assert "task 1 $(rm -rf ~), dog: 6" in line
            assert line.count("\n") == 2  # and that the images have changed
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


# Archives ---------------------------------------------------------------------------------------


class Evil:
    """Unpickling it runs code: it writes the file `ran`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch) -> SmallCifar:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    (tmp_path / "archives").mkdir()
    return SmallCifar(request.param, tmp_path / "archives", monkeypatch)


def members_of(small: SmallCifar) -> list[str]:
    official = small.official
    lists = [*official.train_list, *official.test_list]
    return [official.meta["filename"], *(name for name, _ in lists)]


def clear(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_altered_archives(tally, cifar, rounds):
    """Any archive but the official one is refused unopened."""
    count, random = rounds(10, 100), np.random.RandomState(0)
    with tally("bad archives") as fault:
        for number in range(count):
            with fault.trial(f"cut, part {number} of {count}"):
                cifar.archive.write_bytes(cifar.packed[: len(cifar.packed) * number // count])
                refused(cifar.name, cifar.root, cifar.archive.name, "truncated or altered")
            with fault.trial(f"a byte altered, {number}"):
                content = bytearray(cifar.packed)
                content[random.randint(len(content))] ^= 1 << random.randint(8)
                cifar.archive.write_bytes(content)
                refused(cifar.name, cifar.root, cifar.archive.name, "truncated or altered")


def member(name: str, **fields: Any) -> Callable[[str], tarfile.TarInfo]:
    """Return a builder of a member; FOLDER in its name is the data set's."""

    def build(folder: str) -> tarfile.TarInfo:
        made = tarfile.TarInfo(name.replace("FOLDER", folder))
        for field, value in fields.items():
            setattr(made, field, value)
        return made

    return build


OUTSIDE = Path(tempfile.gettempdir(), f"permafrost-evil-{os.getpid()}")

EVIL_MEMBERS = {
    "an absolute path": member(str(OUTSIDE)),
    "a path above": member("../evil"),
    "a path above, within the folder's": member("FOLDER/../../evil"),
    "a link to outside": member("FOLDER/link", type=tarfile.SYMTYPE, linkname="/etc"),
    "a link above": member("link", type=tarfile.SYMTYPE, linkname="../.."),
    "a hard link to outside": member("FOLDER/link", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a hard link above": member("FOLDER/link", type=tarfile.LNKTYPE, linkname="../../evil"),
    "a device": member("FOLDER/zero", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a disk": member("FOLDER/disk", type=tarfile.BLKTYPE, devmajor=8),
    "a pipe": member("FOLDER/pipe", type=tarfile.FIFOTYPE),
}


def test_evil_members(tally, cifar):
    """Even with the right checksum, an archive writes nowhere else."""
    with tally("bad archives") as fault:
        for name, build in EVIL_MEMBERS.items():
            with fault.trial(name):
                packed = BytesIO()
                with tarfile.open(fileobj=packed, mode="w:gz") as tar:
                    tar.addfile(build(cifar.official.base_folder))
                cifar.archive.write_bytes(packed.getvalue())
                cifar.trust(packed.getvalue())
                refused(cifar.name, cifar.root, cifar.archive.name)
                assert not OUTSIDE.exists()


def trusted(small: SmallCifar, content: bytes) -> None:
    small.archive.write_bytes(content)
    small.trust(content)


NO_ARCHIVES: dict[str, tuple[Callable[[SmallCifar], object], str]] = {
    "a folder": (lambda c: c.archive.mkdir(), "truncated or altered"),
    "a pipe": (lambda c: os.mkfifo(c.archive), "truncated or altered"),
    "a socket": (lambda c: make_socket(c.archive), "truncated or altered"),
    "endless zeros": (lambda c: c.archive.symlink_to("/dev/zero"), "truncated or altered"),
    "a broken link": (lambda c: c.archive.symlink_to("nowhere"), "could not be downloaded"),
    "absent": (lambda c: None, "could not be downloaded"),
    "no archive, trusted": (lambda c: trusted(c, b"no archive"), "could not be extracted"),
    "empty, trusted": (lambda c: trusted(c, b""), "could not be extracted"),
    "cut, trusted": (lambda c: trusted(c, c.packed[:3000]), "could not be extracted"),
    "garbage inside, trusted": (
        lambda c: trusted(c, c.packed[:3000] + bytes(3000)),
        "could not be extracted",
    ),
    "of no members, trusted": (lambda c: trusted(c, pack(c.official, {})), "missing"),
    "without the names, trusted": (
        lambda c: trusted(c, pack(c.official, dict(list(c.members.items())[:-1]))),
        "missing",
    ),
}


def test_no_archives(tally, cifar):
    with tally("bad archives") as fault:
        for name, (make, words) in NO_ARCHIVES.items():
            with fault.trial(name):
                clear(cifar.root)
                make(cifar)
                refused(cifar.name, cifar.root, cifar.archive.name, words)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


BAD_MEMBERS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "altered": lambda path: path.write_bytes(broken(path.read_bytes(), 0.5)),
    "a folder": lambda path: replace(path, Path.mkdir),
    "a pipe": lambda path: replace(path, os.mkfifo),
    "a link to endless zeros": lambda path: replace(path, lambda p: p.symlink_to("/dev/zero")),
    "a broken link": lambda path: replace(path, lambda p: p.symlink_to("nowhere")),
    "code": lambda path: path.write_bytes(pickle.dumps(Evil(path.with_name("ran")))),
}


def test_bad_extracted_folders(tally, cifar):
    with tally("bad archives") as fault:
        for which in members_of(cifar):
            for name, spoil in BAD_MEMBERS.items():
                with fault.trial(f"{which} is {name}"):
                    clear(cifar.root)
                    cifar.write_folder()
                    spoil(cifar.folder / which)
                    refused(cifar.name, cifar.root, which, "md5")
        with fault.trial("a file in the folder's place"):
            clear(cifar.root)
            cifar.folder.touch()
            refused(cifar.name, cifar.root, "missing")


def evil_pickles(marker: Path) -> dict[str, bytes]:
    """Return pickles that name what no array needs."""
    touch = f"touch '{marker}'".encode()
    call = b"(S" + repr(touch.decode()).encode() + b"\ntR."
    return {
        "os.system": pickle.dumps(Evil(marker)),
        "posix.system, protocol 0": b"cposix\nsystem\n" + call,
        "eval": b"c__builtin__\neval\n(S'open(%r, \"w\")'\ntR." % str(marker),
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
        "subprocess": b"csubprocess\ncall\n((lp0\nS'touch'\naS"
        + repr(str(marker)).encode()
        + b"\natR.",
        "an instance": b"(S" + repr(touch.decode()).encode() + b"\nios\nsystem\n.",
        "numpy.load": b"cnumpy\nload\n(S'x'\ntR.",
        "numpy.fromfile": b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR.",
        "numpy's own exec": b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n}tR.",
        "an array's method": b"\x80\x04\x8c\x05numpy\x8c\x0andarray.tofile\x93.",
        "a dotted module": b"cnumpy.core.multiarray.os\nsystem\n" + call,
        "numpy.core with another name": b"cnumpy.core.multiarray\nfromfile\n" + call,
        "codecs": b"c_codecs\nencode\n(S'x'\nS'latin1'\ntR.",
        "a persistent id": b"Pwho\n.",
        "an extension": b"\x82\x01.",
    }


def test_pickles_that_run_code(tally, cifar):
    """Neither with a wrong checksum nor with the right one."""
    marker, good = cifar.root / "ran", dict(cifar.members)
    with tally("pickles that run code") as fault:
        for name, content in evil_pickles(marker).items():
            for which in members_of(cifar)[:2]:
                with fault.trial(f"{name} in {which}"):
                    clear(cifar.root)
                    cifar.write_folder()
                    (cifar.folder / which).write_bytes(content)
                    refused(cifar.name, cifar.root, which, "altered")
                with fault.trial(f"{name} in {which}, trusted"):
                    clear(cifar.root)
                    cifar.members = good | {which: content}
                    cifar.trust_members()
                    cifar.write_archive()
                    refused(cifar.name, cifar.root, which, "is no file of arrays")
                cifar.members = good
                cifar.trust_members()


class Python2Pickler(pickle._Pickler):
    """Writes protocol 2 as Python 2 did: every text is a string of bytes."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text: str) -> None:
        content = text.encode("latin1")
        short = len(content) < 256
        length = bytes([len(content)]) if short else struct.pack("<i", len(content))
        self.write((b"U" if short else b"T") + length + content)
        self.memoize(text)

    def save_bytes(self, content: bytes) -> None:
        self.save_string(content.decode("latin1"))

    dispatch[str], dispatch[bytes] = save_string, save_bytes


def as_python_2(value: object) -> bytes:
    """Pickle as Python 2 and NumPy 1 did."""
    file = BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


@pytest.mark.parametrize("write", [as_python_2, pickle.dumps])
def test_official_format(cifar, tally, write):
    """It is read as torchvision reads it."""
    official, random = cifar.official, np.random.RandomState(1)
    for name in members_of(cifar)[1:]:
        content = {
            "batch_label": "training batch 1 of 5",
            "labels" if cifar.name == "cifar10" else "fine_labels": random.randint(
                10, size=20
            ).tolist(),
            "coarse_labels": [0] * 20,
            "data": random.randint(256, size=(20, 3072)).astype(np.uint8),
            "filenames": [f"a_{number}.png" for number in range(20)],
        }
        cifar.members[name] = write(content)
    names = ["aquarium_fish", "b" * 300, "café", *(f"class {number}" for number in range(7))]
    meta = {official.meta["key"]: names, "num_vis": 3072}
    cifar.members[official.meta["filename"]] = write(meta)
    cifar.trust_members()
    cifar.write_folder()
    if write is as_python_2:
        assert b"cnumpy.core.multiarray\n_reconstruct" in cifar.members[official.test_list[0][0]]
    data = load_dataset(cifar.name, cifar.root, 32)
    with tally("CIFAR as torchvision reads it") as fault:
        for train, part in ((True, data.train), (False, data.test)):
            with fault.trial(f"train {train}"):
                expected = official(cifar.root, train=train)
                assert part is not None
                assert data.class_names == tuple(expected.classes)
                assert part.labels.tolist() == expected.targets
                assert part.labels.dtype == torch.int64
                assert np.array_equal(part.images.permute(0, 2, 3, 1).numpy(), expected.data)


# Names in reports and pictures ------------------------------------------------------------------


@pytest.fixture
def no_mathtext(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("parsed as a formula")

    monkeypatch.setattr("matplotlib.mathtext.MathTextParser.parse", refuse)


def draw_all(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Draw every picture with names in it; return what was written."""
    draw = torch.Generator().manual_seed(0)
    maps = torch.rand(len(names), 8, 8, generator=draw)
    images = torch.zeros(len(names), 3, 8, 8, dtype=torch.uint8)
    evidence = Evidence(
        weights={"conv": torch.ones(2, 3, 3, 3)},
        filter_maps={"conv": torch.rand(2, 8, 8, generator=draw)},
        class_maps=maps,
    )
    half = {"kept": Interval(0.5, None, None), "learned": Interval(0.5, None, None)}
    points = [{"metric": name, "pct": 0.5} | half for name in names]
    draw_saliency(folder / "saliency.png", names, images, maps, maps, names[0])
    draw_best_and_worst(folder / "rank.png", names, evidence, "mse")
    single = [{"label": name} | half for name in names]
    draw_trade_off(folder / "trade_off.png", points, single, 2)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.usefixtures("no_mathtext")
def test_pictures_with_hostile_names(tally, tmp_path, rounds):
    chosen = [*HOSTILE[:5], "n" * 300] if rounds(0, 1) == 0 else HOSTILE
    with tally("hostile class names") as fault:
        for number, name in enumerate(chosen):
            with fault.trial(f"pictures with {name:.30}"):
                (tmp_path / str(number)).mkdir()
                pictures = draw_all(tmp_path / str(number), [name])
                assert len(pictures) == 3
                for content in pictures.values():
                    Image.open(BytesIO(content)).load()


def test_long_names_are_cut_in_pictures(tmp_path):
    one, other = (draw_best(tmp_path / f"{length}.png", "n" * length) for length in (50, 255))
    assert one == other
    assert draw_best(tmp_path / "short.png", "n" * 5) != one


def draw_best(path: Path, name: str) -> bytes:
    maps = torch.eye(8)[None]
    draw_saliency(path, [name], torch.zeros(1, 3, 8, 8, dtype=torch.uint8), maps, maps, "fullgrad")
    return path.read_bytes()


def shown(text: str) -> list[str]:
    """Return the texts that Markdown shows; markup within one is an error."""
    texts = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for part in token.children or []:
            assert part.type in ("text", "text_special"), (part.type, part.content)
        assert not token.type.startswith("html"), token.content
        if token.children:
            texts.append("".join(part.content for part in token.children))
    return texts


NAMES_IN_TABLES = [
    *HOSTILE,
    "a\nb",
    "<!-- x -->",
    "\\|",
    "*a*",
    "__init__",
    "_a_b_",
    "a_b",
    "~~x~~",
]


def test_tables_with_hostile_names(tally):
    with tally("hostile class names") as fault:
        for name in NAMES_IN_TABLES:
            with fault.trial(f"a table with {name:.30}"):
                seen = " ".join(name.split())
                assert shown(markdown([name, "b"], [["c", name]])) == [seen, "b", "c", seen]
        for name in filter(str.isprintable, NAMES_IN_TABLES):  # a profile's name has to be
            with fault.trial(f"a heading with {name:.30}"):
                params = Params(profile=name[:200])
                choices = {
                    "shared": {"freeze": {"chosen": {"pct": 0.5}, "trials": [], "at_edge": []}}
                }
                title = tables([], params, choices).partition("\n")[0]
                assert shown(title) == [f"Results: digits, profile {params.profile}"]


def test_plain_names_stay_readable():
    assert escape("linear_probe 25% (knows the task)") == "linear_probe 25% (knows the task)"
    assert escape("custom.centre_distance:centre_distance").count("_") == 2


def test_workflow_with_hostile_names(tally, tmp_path, rounds):
    """The whole workflow, by DVC, on an image folder of such classes."""
    if not rounds(0, 1):
        pytest.skip("takes a minute: in the long form only")
    with tally("hostile class names") as fault, fault.trial("dvc repro"):
        project = Project(tmp_path / "permafrost")
        names = [HOSTILE[0], "$(touch ran)", r"$\frac{", "a|b", "_x_", "n" * 255, "😀", "قطة"]
        random = np.random.RandomState(0)
        for name in names:
            for number in range(8):
                pixels = random.randint(256, size=(40, 36, 3)).astype(np.uint8)
                put(
                    project.folder / f"data/images/train/{name}/{number}.png",
                    Image.fromarray(pixels),
                )
        split = {"dataset": "image_folder", "root": "data/images", "classes_per_task": 4}
        project.change({"split": split | {"validation": 0.0}})
        project.change({"profile": "<script>alert('`|`')</script>"})
        project.run("dvc", "repro")
        assert not list(tmp_path.rglob("ran"))
        title = (project.folder / "reports/tables.md").read_text().partition("\n")[0]
        assert shown(title) == ["Results: image_folder, profile <script>alert('`|`')</script>"]
        for name in ("saliency/0.png", "rank/0.png", "kept_and_learned.png"):
            Image.open(project.folder / "reports" / name).load()
        assert project.runs() == project.expected_runs()
