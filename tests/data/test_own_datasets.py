"""A user's own data set: found by its place, checked, and watched by what it reads."""

import sys
from pathlib import Path

import pytest
import torch

from permafrost.data import DATASETS, ImageDataset, LabeledImages, load_dataset
from permafrost.errors import InputError
from permafrost.images import images_digest
from permafrost.names import load_checked
from permafrost.params import Params

SIZE = 32
CODE = """
from permafrost.data import ImageDataset, LabeledImages, dataset
import torch

@dataset("ours", needs_root=False)
def ours(root, image_size):
    images = torch.zeros(8, 3, image_size, image_size, dtype=torch.uint8)
    return ImageDataset(("a", "b", "c", "d"), LabeledImages(images, torch.arange(8) % 4), None)

@dataset("theirs", needs_root=True)
def theirs(root, image_size):
    return ours(root, image_size)

@dataset("broken")
def broken(root, image_size):
    raise KeyError("two\\nlines")

RETURNED = None

@dataset("any")
def anything(root, image_size):
    return RETURNED

def plain(root, image_size):
    return ours(root, image_size)
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project's folder with data sets in ``custom/sets.py``."""
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom/sets.py").write_text(CODE)
    for name in [name for name in sys.modules if name.partition(".")[0] == "custom"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("permafrost.registry._snapshots", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("custom")
def test_it_is_loaded_by_its_place_and_is_none_of_the_packages():
    data = load_dataset("custom.sets:ours", None, SIZE)
    assert data.class_names == ("a", "b", "c", "d")
    assert data.train.images.shape == (8, 3, SIZE, SIZE)
    assert set(DATASETS) == {"digits", "cifar10", "cifar100", "image_folder"}


@pytest.mark.usefixtures("custom")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("custom.sets:nothing", ["has no 'nothing'"]),
        ("custom.sets:plain", ["decorate the function with @dataset"]),
        ("custom.nowhere:ours", ["cannot be imported"]),
        ("custom.sets:broken", ["failed", "KeyError", "two\\nlines"]),
        ("custom.sets:theirs", ["split.root: is empty"]),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(name, words):
    with pytest.raises(InputError) as caught:
        load_dataset(name, None, SIZE)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def good() -> dict:
    images = torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8)
    return {"images": images, "labels": torch.tensor([0, 1, 0, 1])}


BAD_PARTS = {
    "float images": {"images": good()["images"].float()},
    "an image size of its own": {"images": good()["images"][..., 1:]},
    "one channel": {"images": good()["images"][:, :1]},
    "channels last": {"images": good()["images"].permute(0, 2, 3, 1)},
    "one image": {"images": good()["images"][0]},
    "an array": {"images": good()["images"].numpy()},
    "nothing for images": {"images": None},
    "a label too few": {"labels": torch.tensor([0, 1, 0])},
    "short labels": {"labels": torch.tensor([0, 1, 0, 1], dtype=torch.int32)},
    "labels in columns": {"labels": torch.tensor([[0], [1], [0], [1]])},
    "a list of labels": {"labels": [0, 1, 0, 1]},
    "a negative label": {"labels": torch.tensor([0, 1, 0, -1])},
    "a label without a name": {"labels": torch.tensor([0, 1, 0, 2])},
    "no images": {"images": good()["images"][:0], "labels": torch.tensor([], dtype=torch.int64)},
}


def returned(value: object, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let a data set return something, and return the refusal."""
    DATASETS.find("custom.sets:anything")
    monkeypatch.setattr(sys.modules["custom.sets"], "RETURNED", value)
    with pytest.raises(InputError) as caught:
        load_dataset("custom.sets:anything", None, SIZE)
    text = str(caught.value)
    assert text.startswith("data set 'custom.sets:anything': ")
    assert "\n" not in text
    return text


@pytest.mark.usefixtures("custom")
class TestWhatItReturns:
    @pytest.mark.parametrize("part", ["train", "test"])
    @pytest.mark.parametrize("name", BAD_PARTS)
    def test_bad_images_and_labels(self, monkeypatch, name, part):
        parts = {"train": LabeledImages(**good()), "test": None}
        parts[part] = LabeledImages(**good() | BAD_PARTS[name])
        assert f" {part}" in returned(ImageDataset(("a", "b"), **parts), monkeypatch)

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (["a", "b"], "tuple of texts"),
            ((1, 2), "tuple of texts"),
            (("a", "a"), "'a' stands twice"),
            (("a", ""), "'' is empty"),
            (("a", "b\n"), r"'b\n' is empty or has control characters"),
        ],
    )
    def test_bad_names(self, monkeypatch, names, words):
        data = ImageDataset(names, LabeledImages(**good()), None)
        assert words in returned(data, monkeypatch)

    def test_something_else(self, monkeypatch):
        assert "returns tuple; wanted: an ImageDataset" in returned((1, 2), monkeypatch)
        data = ImageDataset(("a", "b"), (good()["images"], good()["labels"]), None)
        assert "train is tuple; wanted: LabeledImages" in returned(data, monkeypatch)


# In params.yaml ---------------------------------------------------------------------------------


def split(folder: Path, text: str) -> Params:
    (folder / "params.yaml").write_text(f"split: {{{text}}}")
    return load_checked(folder / "params.yaml")


def test_parameters_take_its_place_and_whether_it_needs_a_folder(custom):
    assert split(custom, "dataset: custom.sets:ours").split.dataset == "custom.sets:ours"
    assert split(custom, "dataset: custom.sets:ours, root: x").split.root == "x"
    assert split(custom, "dataset: custom.sets:theirs, root: x").split.root == "x"
    with pytest.raises(InputError, match=r"split\.root: .*'custom.sets:theirs' needs the folder"):
        split(custom, "dataset: custom.sets:theirs")


@pytest.mark.parametrize(
    "name",
    ["mnist", "custom.sets:nothing", "custom/sets.py:ours", "custom.sets:ours()", "json:load"],
)
def test_parameters_refuse_what_is_no_data_set(custom, name):
    with pytest.raises(InputError, match=r"params.yaml: split\.dataset: ") as caught:
        split(custom, f"dataset: '{name}'")
    assert "\n" not in str(caught.value)


def test_files_in_its_folder_are_watched_by_content_and_place(custom):
    params = split(custom, "dataset: custom.sets:ours, root: files")
    (custom / "files/deep").mkdir(parents=True)
    file = custom / "files/deep/a.npy"
    file.write_bytes(b"one")
    before = images_digest(params, custom)
    assert before == images_digest(params, custom)
    file.write_bytes(b"two")
    changed = images_digest(params, custom)
    moved = file.rename(custom / "files/b.npy")
    assert len({before, changed, images_digest(params, custom)}) == 3
    moved.unlink()
    assert images_digest(split(custom, "dataset: custom.sets:ours"), custom) is None
