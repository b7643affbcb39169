"""Stored networks, loaded to answer again: as they were trained, for each head and task."""

import re
import sys

import pytest
import torch
from PIL import Image

import permafrost
from permafrost import registry
from permafrost.data import normalize
from permafrost.data.image_folder import image_folder
from permafrost.errors import DamagedError, InputError
from permafrost.experiment import train_first_task
from permafrost.tensors import load_tensors, save_tensors
from small_data import put
from small_runs import CPU, make_params

TRAINING = permafrost.TrainingConfig(epochs=4, lr=0.01, batch_size=4)


@pytest.fixture
def learned(make_sequence, tmp_path):
    """Return a function that learns two tasks, and returns them, the result and its file."""

    def learn(**settings):
        tasks = make_sequence(train=8)
        settings = {"network": "vgg11", "width": 0.05, "training": TRAINING} | settings
        result = permafrost.learn(tasks, **settings)
        result.save(tmp_path / "saved.safetensors")
        return tasks, result, tmp_path / "saved.safetensors"

    return learn


@pytest.mark.parametrize("head", ["shared", "multi", "expanding"])
def test_it_answers_as_the_network_that_was_trained(learned, head):
    tasks, result, path = learned(head=head)
    for index, task in enumerate(tasks.tasks):
        network = permafrost.load_network(path, None if head == "expanding" else index + 1)
        assert not any(module.training for module in network.modules())
        assert network.image_size == (32, 32)
        assert network.normalization == tasks.normalization
        images = normalize(task.test.images, tasks.normalization)
        logits = result.network.view(head, index, 2)(images)
        assert torch.equal(network(images), logits)
        # As it was measured.
        named = network.predict(task.test.images)
        truth = [task.classes[label] for label in task.test.labels]
        right = [name == true for name, true in zip(named, truth, strict=True)]
        assert sum(right) / len(right) == result.accuracy[-1][index]
        one = task.test.images[0]
        assert network.predict(one) == named[0]
        picture = Image.fromarray(one.permute(1, 2, 0).numpy())
        assert network.predict(picture) == named[0]


def test_a_picture_is_prepared_as_an_image_folders(learned, tmp_path, monkeypatch):
    _, _, path = learned(head="expanding")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, 50, 70), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    file = put(tmp_path / "photos/train/a/one.png", picture)
    expected = normalize(
        image_folder(tmp_path / "photos", 32).train.images,
        permafrost.load_network(path).normalization,
    )
    network = permafrost.load_network(path)
    seen = []
    network.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for given in (pixels, pixels[None], picture, Image.open(file)):
        network.predict(given)
    assert all(torch.equal(images, expected) for images in seen)
    assert len(seen) == 4
    for mode in ("L", "RGBA", "P", "1"):
        assert network.predict(picture.convert(mode)) in network.classes
    assert network.predict(pixels[None][:0]) == []


@pytest.mark.parametrize(
    "pictures", [torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8)], ids=["float", "grey"]
)
def test_tensors_that_are_no_pictures(learned, pictures):
    _, _, path = learned(training=permafrost.TrainingConfig(epochs=0))
    with pytest.raises(ValueError, match=r"wanted: uint8 of shape \(3, H, W\)"):
        permafrost.load_network(path, 1).predict(pictures)


def test_a_first_tasks_network_answers_for_it_alone(store, make_sequence):
    tasks = make_sequence()
    record = train_first_task(store, make_params(), 0, tasks, "tasks", CPU)
    path = store.model_path(record["key"])
    network = permafrost.load_network(path)
    assert network.classes == tasks.tasks[0].classes
    assert permafrost.load_network(str(path), 1).classes == network.classes
    with pytest.raises(InputError, match=r"task: is 2; allowed with the network of .*: 1\.\.1"):
        permafrost.load_network(path, 2)


def test_the_task_must_be_told_where_it_decides(learned):
    _, _, path = learned(training=permafrost.TrainingConfig(epochs=0))
    for task in (None, 0, 3):
        with pytest.raises(InputError, match=rf"task: is {task}; allowed with .*: 1\.\.2"):
            permafrost.load_network(path, task)
    _, _, path = learned(training=permafrost.TrainingConfig(epochs=0), head="expanding")
    with pytest.raises(InputError, match=r"task: is 1, but .* allowed: None"):
        permafrost.load_network(path, 1)


def test_a_network_that_needs_what_its_strategy_kept_is_refused(learned):
    _, _, path = learned(strategy="packnet", head="multi")
    with pytest.raises(InputError, match="PackNet answers with what it keeps besides the network"):
        permafrost.load_network(path, 1)


def test_files_that_cannot_be_used(learned, tmp_path):
    _, _, path = learned(training=permafrost.TrainingConfig(epochs=0))
    tensors, about = load_tensors(path)
    other = tmp_path / "other.safetensors"
    for old in (None, {}, [], {"arch": "vgg11"}, about | {"more": 1}):
        save_tensors(other, tensors, old)
        with pytest.raises(InputError, match=f"{re.escape(str(other))}: does not say what") as told:
            permafrost.load_network(other, 1)
        assert "\n" not in str(told.value)
    save_tensors(other, tensors, about | {"arch": "vgg13"})
    with pytest.raises(InputError, match="its weights do not fit vgg13"):
        permafrost.load_network(other, 1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    with pytest.raises(DamagedError, match="is not what was written"):
        permafrost.load_network(other, 1)
    with pytest.raises(InputError, match="not found"):
        permafrost.load_network(tmp_path / "none", 1)


OWN = """
from torch import nn

def small(width):
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))
"""


def test_a_users_own_network_is_found_where_the_file_lies(learned, write_own, monkeypatch):
    module = write_own(OWN)
    tasks, result, path = learned(network=f"{module}:small")
    # As in a new process, elsewhere.
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(path.parent)])
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(registry, "_snapshots", {})
    network = permafrost.load_network(path, 2)
    assert module in sys.modules
    images = normalize(tasks.tasks[1].test.images, tasks.normalization)
    assert torch.equal(network(images), result.network.view("shared", 1, 2)(images))
