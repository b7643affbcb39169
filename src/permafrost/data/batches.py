"""Batches of a data set that lives on the device, cropped, flipped and normalised at once."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.data.images import LabeledImages
from permafrost.data.tasks import Normalization
from permafrost.stopping import stop_if_requested


def normalize(images: Tensor, normalization: Normalization) -> Tensor:
    """Scale images to 0..1, subtract the mean and divide by the standard deviation.

    Parameters
    ----------
    images : Tensor
        uint8 of shape (..., 3, H, W), 0..255.
    normalization : Normalization
        The statistics of the channels.

    Returns
    -------
    Tensor
        float32 of the same shape, on the same device.
    """
    mean, std = _as_tensors(normalization, images.device)
    return _standardize(images, mean, std)


def _as_tensors(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(
        [normalization.mean, normalization.std], dtype=torch.float32, device=device
    )[..., None, None]
    return mean, std


def _standardize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    # In this order, the result is torchvision's to the last bit.
    return images.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor of the CPU to a device without waiting for it."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Batches:
    """Labelled images that live on the device and leave it in normalised batches.

    Before each batch a stop is made that was asked for: see :mod:`permafrost.stopping`.

    Parameters
    ----------
    data : LabeledImages
        The images and labels.
    normalization : Normalization
        The statistics to normalise with.
    device : torch.device or str
        Where the data lives and the batches are made.

    Attributes
    ----------
    images : Tensor
        uint8 of shape (N, 3, H, W), on the device.
    labels : Tensor
        int64 of shape (N,), on the device.
    """

    def __init__(
        self, data: LabeledImages, normalization: Normalization, device: torch.device | str
    ) -> None:
        self.images = data.images.to(device)
        self.labels = data.labels.to(device)
        self._mean, self._std = _as_tensors(normalization, self.images.device)
        self._padded = (0, self.images)  # the padding, and the images with it

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(
        self, generator: torch.Generator, batch_size: int, *, flip: bool, padding: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Return shuffled, augmented batches in which every image comes once.

        All random numbers of the epoch are drawn by this call, on the CPU: neither the device nor
        an epoch that is left early changes what the generator draws next.

        Parameters
        ----------
        generator : torch.Generator
            A generator of the CPU.
        batch_size : int
            At least 1. The last batch holds what is left over, down to one image; no image is left
            out of an epoch. A data set that is smaller than a batch is one batch.
        flip : bool
            Mirror each image left to right with probability 1/2, after the crop.
        padding : int
            Not negative: surround each image with so many black pixels, then crop a window of the
            old size at a uniformly random place (0: no crop).

        Returns
        -------
        iterator of (Tensor, Tensor, Tensor)
            Normalised images, float32 of shape (B, 3, H, W), labels, int64 of shape (B,), and the
            images' positions in the data, int64 of shape (B,).
        """
        count, device = len(self), self.images.device
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(2 * padding + 1, (count, 2), generator=generator)
        chances = torch.rand(count, generator=generator, dtype=torch.float32)
        drawn = (order, offsets, chances.lt(0.5 if flip else 0))
        order, offsets, flips = (_moved(tensor, device) for tensor in drawn)
        return self._augmented(self._pad(padding), order, offsets, flips, batch_size)

    def ordered(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images as they are, in their order.

        Parameters
        ----------
        batch_size : int
            At least 1; the last batch may be smaller.

        Yields
        ------
        tuple of (Tensor, Tensor)
            Normalised images, float32 of shape (B, 3, H, W), and labels, int64 of shape (B,).
        """
        for start in range(0, len(self), batch_size):
            stop_if_requested()
            part = slice(start, start + batch_size)
            yield _standardize(self.images[part], self._mean, self._std), self.labels[part]

    def at(self, positions: Tensor) -> Tensor:
        """Return the images at these positions as they are, normalised, (N, 3, H, W)."""
        return _standardize(self.images[positions], self._mean, self._std)

    def _pad(self, padding: int) -> Tensor:
        """Return the padded images, kept from one epoch to the next."""
        if self._padded[0] != padding:
            self._padded = (padding, F.pad(self.images, [padding] * 4))
        return self._padded[1]

    def _augmented(
        self, padded: Tensor, order: Tensor, offsets: Tensor, flips: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        height, width = self.images.shape[2:]
        # A view of every window of every image: (N, 3, tops, lefts, H, W). Three short indices into
        # it copy whole windows, which is many times faster than an index for every pixel.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        for start in range(0, len(order), batch_size):
            stop_if_requested()
            part = slice(start, start + batch_size)
            index = order[part]
            window = windows[index, :, offsets[part, 0], offsets[part, 1]]
            window = torch.where(flips[part, None, None, None], window.flip(3), window)
            yield _standardize(window, self._mean, self._std), self.labels[index], index
