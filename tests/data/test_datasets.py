"""The data sets: by name, from a folder, and no larger than the memory."""

import os
import subprocess
import sys

import pytest

from permafrost.data import DATASETS, load_dataset
from permafrost.errors import InputError
from permafrost.source import PACKAGE_SOURCES, reached
from small_data import fails


def test_unknown_name_lists_the_known_ones():
    fails("mnist", None, "data set 'mnist'", *DATASETS)


def test_bad_image_size():
    fails("digits", None, "split.image_size", "at least 1", size=0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "image_folder"])
def test_root_is_needed_and_is_a_folder(name, tmp_path):
    fails(name, None, "split.root")
    (tmp_path / "file").touch()
    fails(name, tmp_path / "file", "split.root", "no folder")


def test_what_learns_from_images_reaches_no_reader():
    """A change of a reader changes no training."""
    found = reached(["permafrost.strategies.ewc"], PACKAGE_SOURCES)
    data = {module for module in found if module.startswith("permafrost.data")}
    assert data == {f"permafrost.data.{name}" for name in ("images", "tasks", "batches")}


def test_readers_import_large_packages_only_when_they_read():
    code = "import sys, permafrost.data as data; list(data.DATASETS); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "permafrost.data.cifar" in loaded.stdout.split()
    assert not {"torchvision", "sklearn"} & set(loaded.stdout.split())


def test_more_than_the_memory_is_refused(monkeypatch):
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10_000}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    load_dataset("digits", None, 32)
    with pytest.raises(InputError, match=r"split\.image_size: 1797 images of 64 x 64 .* memory"):
        load_dataset("digits", None, 64)
