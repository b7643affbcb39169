"""Small archives and folders of images, as tests of data sets write them."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from permafrost.data import load_dataset
from permafrost.errors import InputError


def fails(name: str, root: Path | None, *words: str, size: int = 32) -> str:
    """Load in vain, and return the one line that says why."""
    with pytest.raises(InputError) as caught:
        load_dataset(name, root, size)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def cifar_members(official: type[CIFAR10]) -> dict[str, bytes]:
    """Return small files in the official layout: four images a file, labels 3 to 0."""
    key = "labels" if official is CIFAR10 else "fine_labels"
    members = {}
    for seed, (name, _) in enumerate([*official.train_list, *official.test_list]):
        pixels = np.random.RandomState(seed).randint(256, size=(4, 3072)).astype(np.uint8)
        members[name] = pickle.dumps({"data": pixels, key: [3, 2, 1, 0]})
    members[official.meta["filename"]] = pickle.dumps({official.meta["key"]: ["z", "y", "x", "w"]})
    return members


def pack(official: type[CIFAR10], members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"{official.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


class SmallCifar:
    """A small stand-in for an official archive, whose checksums replace the official ones."""

    def __init__(self, name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.root, self.monkeypatch = name, root, monkeypatch
        self.official = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
        self.members = cifar_members(self.official)
        self.archive = root / self.official.filename
        self.folder = root / self.official.base_folder
        self.trust_members()

    def trust_members(self) -> None:
        """Give the files the official checksums."""
        for files in ("train_list", "test_list"):
            names = [name for name, _ in getattr(self.official, files)]
            sums = [[name, md5(self.members[name])] for name in names]
            self.monkeypatch.setattr(self.official, files, sums)
        meta = self.official.meta
        meta = meta | {"md5": md5(self.members[meta["filename"]])}
        self.monkeypatch.setattr(self.official, "meta", meta)
        self.packed = pack(self.official, self.members)
        self.trust(self.packed)

    def trust(self, packed: bytes) -> None:
        self.monkeypatch.setattr(self.official, "tgz_md5", md5(packed))

    def write_archive(self) -> None:
        self.archive.write_bytes(self.packed)

    def write_folder(self) -> None:
        self.folder.mkdir()
        for name, content in self.members.items():
            (self.folder / name).write_bytes(content)

    def check(self) -> None:
        data = load_dataset(self.name, self.root, 32)
        assert data.class_names == ("z", "y", "x", "w")
        assert data.test is not None
        for part, files in (
            (data.train, self.official.train_list),
            (data.test, self.official.test_list),
        ):
            pixels = [pickle.loads(self.members[name])["data"] for name, _ in files]
            expected = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32)
            assert torch.equal(part.images, expected)
            assert part.labels.tolist() == [3, 2, 1, 0] * len(files)
            assert part.labels.dtype == torch.int64


def put(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 8), "red")).save(path, **options)
    return path
