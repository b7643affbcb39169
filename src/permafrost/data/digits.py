"""scikit-learn's handwritten digits (UCI Optical Recognition of Handwritten Digits)."""

from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch

from permafrost.data.datasets import dataset
from permafrost.data.images import ImageDataset, ImageSize, LabeledImages, resize

# The file behind sklearn.datasets.load_digits: to import scikit-learn takes seconds.
_FILE = "sklearn/datasets/data/digits.csv.gz"


@dataset("digits", files=None)
def digits(root: Path | None, image_size: ImageSize) -> ImageDataset:
    """Return 10 classes, 1797 images of 8 x 8, in three equal channels; no test part."""
    del root
    path = distribution("scikit-learn").locate_file(_FILE)
    table = torch.from_numpy(np.loadtxt(str(path), delimiter=","))  # 64 pixels and a label
    grey = table[:, :64].reshape(-1, 1, 8, 8).float() * (255 / 16)
    images = resize(grey, image_size).repeat(1, 3, 1, 1)
    names = tuple(str(label) for label in range(10))
    return ImageDataset(names, LabeledImages(images, table[:, 64].long()), test=None)
