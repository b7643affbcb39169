"""CIFAR-10 and CIFAR-100 by torchvision, which unpickles only what passed its checksum here."""

import os
import tarfile
import tempfile
from http.client import HTTPException
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_url

from permafrost.data.datasets import ImageDataset, LabeledImages, one_line, resize
from permafrost.errors import InputError

__all__ = ["CIFAR10", "CIFAR100", "read_cifar"]


def read_cifar(official: type[CIFAR10], root: Path, size: int) -> ImageDataset:
    """Read the extracted folder if there is one, else the archive, downloaded if need be.

    Parameters
    ----------
    official : type
        torchvision's class, which knows address and checksums (CIFAR100 is a CIFAR10).
    root : Path
        The folder of the archive.
    size : int
        Side of the images, pixels.

    Raises
    ------
    InputError
        A file that is missing and cannot be downloaded, or is truncated or altered.
    """
    folder, archive = root / official.base_folder, root / official.filename
    if folder.exists():
        _check_members(official, root, found_in=folder)
        return _read_cifar(official, root, size)
    if not archive.exists():
        _download(official, root)
    # For this one reading only: `root` may be read-only, and no half-written folder can stay.
    with tempfile.TemporaryDirectory() as unpacked:
        _unpack(official, archive, Path(unpacked))
        _check_members(official, Path(unpacked), found_in=archive)
        return _read_cifar(official, Path(unpacked), size)


def _advice(official: type[CIFAR10], root: Path) -> str:
    return f"get {official.url} (md5 {official.tgz_md5}) and put it into {str(root)!r}"


def _download(official: type[CIFAR10], root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        # The archive gets its name only once it is whole.
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as part:
            download_url(official.url, part, official.filename, official.tgz_md5)
            os.replace(Path(part, official.filename), root / official.filename)
    except (OSError, RuntimeError, HTTPException) as error:
        raise InputError(
            f"split.root: {official.filename} could not be downloaded ({one_line(error)}); "
            f"{_advice(official, root)}"
        ) from error


def _unpack(official: type[CIFAR10], archive: Path, target: Path) -> None:
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


def _check_members(official: type[CIFAR10], root: Path, found_in: Path) -> None:
    """Check every file that torchvision will unpickle: unpickling an altered one may run code."""
    meta = (official.meta["filename"], official.meta["md5"])
    for name, md5 in (*official.train_list, *official.test_list, meta):
        if not _has_md5(root / official.base_folder / name, md5):
            raise InputError(
                f"split.root: {name} in {str(found_in)!r} is missing, truncated or altered (not "
                f"the official md5 {md5}); remove {found_in.name} and "
                f"{_advice(official, found_in.parent)}"
            )


def _has_md5(path: Path, md5: str) -> bool:
    try:
        return check_integrity(path, md5)
    except OSError as error:
        raise InputError(f"split.root: {str(path)!r} is unreadable ({one_line(error)})") from error


def _read_cifar(official: type[CIFAR10], root: Path, size: int) -> ImageDataset:
    train, test = official(root, train=True), official(root, train=False)
    return ImageDataset(tuple(train.classes), _cifar_images(train, size), _cifar_images(test, size))


def _cifar_images(part: CIFAR10, size: int) -> LabeledImages:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    if images.shape[-1] != size:
        images = resize(images, size)
    return LabeledImages(images, torch.tensor(part.targets, dtype=torch.int64))
