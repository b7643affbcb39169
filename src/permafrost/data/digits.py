"""scikit-learn's handwritten digits (UCI Optical Recognition of Handwritten Digits)."""

from pathlib import Path

import torch

from permafrost.data.datasets import dataset
from permafrost.data.images import ImageDataset, LabeledImages, resize


@dataset("digits", files=None)
def digits(root: Path | None, image_size: int) -> ImageDataset:
    """Return 10 classes, 1797 images of 8 x 8, in three equal channels; no test part."""
    from sklearn.datasets import load_digits  # not needed by any other data set

    del root
    found = load_digits()
    grey = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    images = resize(grey, image_size).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(found.target).long()
    names = tuple(str(name) for name in found.target_names)
    return ImageDataset(names, LabeledImages(images, labels), test=None)
