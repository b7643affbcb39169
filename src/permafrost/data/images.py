"""What a data set is: labelled images, uint8 tensors of one size with three channels."""

import os
import unicodedata
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.errors import InputError

_UNSHOWN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, undecoded bytes, breaks of lines
_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # text right to left
# A side, or (height, width), in pixels.
ImageSize = int | tuple[int, int]
RESIZE_CHUNK = 1000  # images a time, so that the float copy stays small


@dataclass(frozen=True, eq=False)
class LabeledImages:
    """Images and the class of each.

    Parameters
    ----------
    images : Tensor
        uint8 of shape (N, 3, H, W), 0..255.
    labels : Tensor
        int64 of shape (N,), indices of classes from 0.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageDataset:
    """A whole data set.

    Parameters
    ----------
    class_names : tuple of str
        The names in label order: label ``i`` is ``class_names[i]``.
    train : LabeledImages
        The training images.
    test : LabeledImages or None
        The test images; None where the data set has no test part of its own.
    """

    class_names: tuple[str, ...]
    train: LabeledImages
    test: LabeledImages | None


def sides(size: ImageSize) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else size


def resize(images: Tensor, size: ImageSize) -> Tensor:
    """Resize images with values 0..255, (N, C, H, W), to uint8 of (N, C, height, width).

    Bilinearly, antialiased when they shrink.
    """
    require_memory(len(images), size)
    chunks = [
        F.interpolate(chunk.float(), sides(size), mode="bilinear", antialias=True)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for chunk in images.split(RESIZE_CHUNK)
    ]
    return torch.cat(chunks)


def require_memory(images: int, size: ImageSize) -> None:
    """Refuse what this machine cannot hold: the images, their share of tasks and a copy."""
    height, width = sides(size)
    needed = 3 * (images * 3 * height * width)
    if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise InputError(
            f"split.image_size: {images} images of {height} x {width} pixels take "
            f"{needed / 1e9:.0f} GB, more than this machine's memory; allowed: smaller ones"
        )


def can_be_shown(name: str) -> bool:
    """Return whether pictures, tables and terminals can show the name of a class."""
    return not any(
        unicodedata.category(char) in _UNSHOWN or unicodedata.bidirectional(char) in _TURNING
        for char in name
    )
