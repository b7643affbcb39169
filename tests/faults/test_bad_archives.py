"""Bad archives: only the official bytes are unpacked, and no pickle runs code."""

import os
import pickle
import struct
import tarfile
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from hostile_data import broken, make_socket, refused
from permafrost.data import load_dataset
from small_data import SmallCifar, pack


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
