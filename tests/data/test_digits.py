"""The digits: scikit-learn's pixels and labels, resized."""

import torch
import torchvision.transforms.functional as TF

from permafrost.data import load_dataset


def test_digits():
    from sklearn.datasets import load_digits

    data = load_dataset("digits", None, 8)
    assert data.class_names == tuple("0123456789")
    assert data.test is None
    assert data.train.images.shape == (1797, 3, 8, 8)
    assert data.train.images.dtype == torch.uint8
    expected = torch.from_numpy(load_digits().images * 255 / 16).round().to(torch.uint8)
    for channel in data.train.images.unbind(1):
        assert torch.equal(channel, expected)
    assert data.train.labels.tolist() == load_digits().target.tolist()
    assert data.train.labels.dtype == torch.int64


def test_digits_are_resized():
    small, large = (load_dataset("digits", None, size).train.images for size in (8, 32))
    assert large.shape == (1797, 3, 32, 32)
    expected = TF.resize(small.float(), [32, 32], antialias=True)
    assert (large.float() - expected).abs().max() <= 1  # `small` itself is rounded
