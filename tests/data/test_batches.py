"""Batches: the same pixels as torchvision's transforms give, image by image."""

import pytest
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from permafrost.data import Batches, LabeledImages, Normalization, normalize

PLAIN = Normalization((0.0,) * 3, (1.0,) * 3)
SOME = Normalization((0.49, 0.48, 0.44), (0.24, 0.25, 0.26))


def some_images(count: int = 23, height: int = 8, width: int = 8) -> LabeledImages:
    images = torch.randint(
        256, (count, 3, height, width), generator=torch.Generator().manual_seed(1)
    )
    return LabeledImages(images.to(torch.uint8), torch.arange(count))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def one_by_one(data: LabeledImages, padding: int, flip: bool) -> Tensor:
    """Augment with torchvision, with the random numbers that an epoch draws."""
    random, count = generator(), len(data)
    height, width = data.images.shape[2:]
    order = torch.randperm(count, generator=random)
    offsets = torch.randint(2 * padding + 1, (count, 2), generator=random)
    flips = torch.rand(count, generator=random) < 0.5
    augmented = []
    for index, (top, left), flipped in zip(order, offsets.tolist(), flips, strict=True):
        image = TF.crop(TF.pad(data.images[index], [padding]), top, left, height, width)
        augmented.append(TF.hflip(image) if flip and flipped else image)
    return torch.stack(augmented)


@pytest.mark.parametrize("shape", [(8, 8), (6, 9)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_and_flip_are_torchvisions(shape, flip, padding):
    data = some_images(23, *shape)
    batches = Batches(data, PLAIN, "cpu").epoch(generator(), 5, flip=flip, padding=padding)
    images = torch.cat([images for images, _, _ in batches])
    assert torch.equal(as_bytes(images), one_by_one(data, padding, flip))


def test_random_crops_reach_every_offset_and_half_are_flipped():
    data = LabeledImages(
        torch.arange(1, 5, dtype=torch.uint8).view(1, 1, 2, 2).repeat(4000, 3, 1, 1),
        torch.zeros(4000, dtype=torch.int64),
    )
    batches = Batches(data, PLAIN, "cpu").epoch(generator(), 4000, flip=True, padding=1)
    images, _, _ = next(batches)
    windows, counts = as_bytes(images)[:, 0].flatten(1).unique(dim=0, return_counts=True)
    assert len(windows) == 9 * 2  # but those of a corner pixel alone are told apart by its place
    assert counts.min() > 4000 / 18 * 0.7


def test_every_image_comes_once_with_its_label():
    data = some_images(23)
    batches = list(Batches(data, PLAIN, "cpu").epoch(generator(), 5, flip=False, padding=0))
    for part in zip(*batches, strict=True):
        assert [len(values) for values in part] == [5, 5, 5, 5, 3]
    images, labels, positions = (torch.cat(part) for part in zip(*batches, strict=True))
    assert labels.tolist() != list(range(23))
    assert sorted(labels.tolist()) == list(range(23))
    assert torch.equal(as_bytes(images), data.images[labels])
    assert torch.equal(positions, labels)  # the labels number the images through


@pytest.mark.parametrize("padding", [0, 2])
def test_positions_say_where_an_augmented_image_stands(padding):
    data = LabeledImages(some_images(23).images, torch.arange(23) * 7 % 5)
    drawn = Batches(data, PLAIN, "cpu").epoch(generator(), 4, flip=True, padding=padding)
    _, labels, positions = (torch.cat(part) for part in zip(*drawn, strict=True))
    assert positions.dtype == torch.int64
    assert torch.equal(positions, torch.randperm(23, generator=generator()))
    assert torch.equal(labels, data.labels[positions])


def test_same_generator_same_epochs_and_the_next_epoch_differs():
    first, second = generator(), generator()
    batches = Batches(some_images(), SOME, "cpu")
    epochs = [
        torch.cat([images for images, _, _ in batches.epoch(random, 4, flip=True, padding=2)])
        for random in (first, second, first)
    ]
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def test_random_numbers_are_drawn_before_the_first_batch():
    used, left_early = generator(), generator()
    batches = Batches(some_images(), SOME, "cpu")
    list(batches.epoch(used, 4, flip=True, padding=2))
    batches.epoch(left_early, 4, flip=True, padding=2)
    assert torch.equal(used.get_state(), left_early.get_state())


def test_batch_size_and_augmentation_leave_the_order_alone():
    batches = Batches(some_images(), SOME, "cpu")
    plain = batches.epoch(generator(), 4, flip=False, padding=0)
    augmented = batches.epoch(generator(), 7, flip=True, padding=3)
    plain, augmented = (
        [torch.cat(part) for part in zip(*epoch, strict=True)] for epoch in (plain, augmented)
    )
    assert torch.equal(plain[1], augmented[1])
    assert torch.equal(plain[2], augmented[2])


def test_padding_may_change_from_epoch_to_epoch():
    data, batches = some_images(), Batches(some_images(), PLAIN, "cpu")
    for padding in (4, 0, 2):
        images, _, _ = next(batches.epoch(generator(), 23, flip=True, padding=padding))
        assert torch.equal(as_bytes(images), one_by_one(data, padding, flip=True))


def test_ordered_is_the_data_itself():
    data = some_images()
    batches = list(Batches(data, SOME, "cpu").ordered(10))
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, normalize(data.images, SOME))


def test_no_images_no_batches():
    batches = Batches(some_images(0), SOME, "cpu")
    assert len(batches) == 0
    assert list(batches.ordered(4)) == []
    assert list(batches.epoch(generator(), 4, flip=True, padding=1)) == []


def test_normalize_is_torchvisions_and_keeps_its_input():
    images = some_images().images
    before = images.clone()
    expected = TF.normalize(images.float() / 255, list(SOME.mean), list(SOME.std))
    assert normalize(images, SOME).dtype == torch.float32
    assert torch.equal(normalize(images, SOME), expected)
    assert torch.equal(normalize(images[0], SOME), expected[0])
    assert torch.equal(images, before)


def test_padding_is_black_before_normalisation():
    data = LabeledImages(
        torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    )
    batches = Batches(data, SOME, "cpu")
    black = normalize(torch.zeros(3, 1, 1, dtype=torch.uint8), SOME)
    white = normalize(torch.full((3, 1, 1), 255, dtype=torch.uint8), SOME)
    random = generator()
    for _ in range(20):
        images, _, _ = next(batches.epoch(random, 1, flip=False, padding=2))
        assert torch.equal(images[0], torch.where(images[0] > 0, white, black))
