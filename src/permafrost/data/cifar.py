"""CIFAR-10 and CIFAR-100, from the addresses and with the checksums that torchvision knows."""

import os
import pickle
import socket
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from permafrost.data.datasets import dataset
from permafrost.data.images import ImageDataset, ImageSize, LabeledImages, resize, sides
from permafrost.errors import InputError, one_line

if TYPE_CHECKING:  # torchvision takes seconds to import
    from torchvision.datasets import CIFAR10

_SILENCE = 60.0  # seconds after which a server that sends nothing is given up


@dataset("cifar10", needs_root=True, files=None)
def cifar10(root: Path, image_size: ImageSize) -> ImageDataset:
    """Read CIFAR-10 (Krizhevsky 2009), 32 x 32, classes in the official label order.

    `root` holds the official archive or the folder extracted from it; if it holds neither, the
    archive is downloaded there. Only files with the official checksums are read.
    """
    from torchvision.datasets import CIFAR10

    return _read_cifar(CIFAR10, root, image_size)


@dataset("cifar100", needs_root=True, files=None)
def cifar100(root: Path, image_size: ImageSize) -> ImageDataset:
    """Read CIFAR-100, as :func:`cifar10`."""
    from torchvision.datasets import CIFAR100

    return _read_cifar(CIFAR100, root, image_size)


def _read_cifar(official: "type[CIFAR10]", root: Path, size: ImageSize) -> ImageDataset:
    """Read the extracted folder if there is one, else the archive, downloaded if need be.

    ``official`` is torchvision's class, which knows address and checksums.
    """
    folder, archive = root / official.base_folder, root / official.filename
    if folder.exists():
        _check_members(official, folder, found_in=folder)
        return _read_folder(official, folder, size)
    if not archive.exists():
        _download(official, root)
    # For this one reading only: `root` may be read-only, and no half-written folder can stay.
    with tempfile.TemporaryDirectory() as unpacked:
        _unpack(official, archive, Path(unpacked))
        folder = Path(unpacked, official.base_folder)
        _check_members(official, folder, found_in=archive)
        return _read_folder(official, folder, size)


def _advice(official: "type[CIFAR10]", root: Path) -> str:
    return f"get {official.url} (md5 {official.tgz_md5}) and put it into {str(root)!r}"


def _download(official: "type[CIFAR10]", root: Path) -> None:
    from torchvision.datasets.utils import download_url

    try:
        root.mkdir(parents=True, exist_ok=True)
        # The archive gets its name only once it is whole.
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as part:
            with _patience(_SILENCE):
                download_url(official.url, part, official.filename, official.tgz_md5)
            os.replace(Path(part, official.filename), root / official.filename)
    except (OSError, RuntimeError, HTTPException) as error:
        raise InputError(
            f"split.root: {official.filename} could not be downloaded ({one_line(error)}); "
            f"{_advice(official, root)}"
        ) from error


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Wait for a server no longer than that at a time; torchvision itself waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _unpack(official: "type[CIFAR10]", archive: Path, target: Path) -> None:
    if not _has_md5(archive, official.tgz_md5):
        raise InputError(
            f"split.root: {str(archive)!r} is truncated or altered (not the official md5); "
            f"remove it and {_advice(official, archive.parent)}"
        )
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(
            f"split.root: {str(archive)!r} could not be extracted ({one_line(error)})"
        ) from error


def _check_members(official: "type[CIFAR10]", folder: Path, found_in: Path) -> None:
    """Check every file before one is read."""
    meta = (official.meta["filename"], official.meta["md5"])
    for name, md5 in (*official.train_list, *official.test_list, meta):
        if not _has_md5(folder / name, md5):
            raise InputError(
                f"split.root: {name} in {str(found_in)!r} is missing, truncated or altered (not "
                f"the official md5 {md5}); remove {found_in.name} and "
                f"{_advice(official, found_in.parent)}"
            )


def _has_md5(path: Path, md5: str) -> bool:
    from torchvision.datasets.utils import check_integrity

    try:
        return check_integrity(path, md5)
    except OSError as error:
        raise InputError(f"split.root: {str(path)!r} is unreadable ({one_line(error)})") from error


def _read_folder(official: "type[CIFAR10]", folder: Path, size: ImageSize) -> ImageDataset:
    names = unpickle(folder / official.meta["filename"])[official.meta["key"]]
    train, test = (
        _join([unpickle(folder / name) for name, _ in files], size)
        for files in (official.train_list, official.test_list)
    )
    return ImageDataset(tuple(names), train, test)


def _join(parts: list[dict[str, Any]], size: ImageSize) -> LabeledImages:
    key = "labels" if "labels" in parts[0] else "fine_labels"
    images = torch.from_numpy(np.concatenate([part["data"] for part in parts]))
    images = images.view(-1, 3, 32, 32)
    if sides(size) != (32, 32):
        images = resize(images, size)
    return LabeledImages(images, torch.cat([torch.tensor(part[key]) for part in parts]))


class _ArrayUnpickler(pickle.Unpickler):
    """Makes arrays, and what needs no class; whatever else a pickle names may run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what the official files name, which NumPy 1 wrote."""
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return super().find_class(module, name)


_ARRAYS = {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy._core.multiarray", "_reconstruct")}


def unpickle(path: Path) -> dict[str, Any]:
    """Read a file of arrays, numbers and text.

    Raises
    ------
    InputError
        If it is broken or names anything else.
    """
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle raises almost anything
        raise InputError(
            f"split.root: {str(path)!r} is no file of arrays ({one_line(error)})"
        ) from error
