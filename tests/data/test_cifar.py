"""CIFAR: official archives and folders alone are read, and downloads leave no parts."""

import io
import socket
import urllib.error
import urllib.request
from contextlib import closing

import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.datasets import CIFAR10, CIFAR100

from permafrost.data import load_dataset
from small_data import SmallCifar, fails, pack


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch) -> SmallCifar:
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return SmallCifar(request.param, tmp_path, monkeypatch)


@pytest.fixture
def nothing_unpickled(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr("permafrost.data.cifar.unpickle", refuse)


def test_found_archive_is_read_and_leaves_nothing_behind(cifar):
    cifar.write_archive()
    cifar.check()
    assert list(cifar.root.iterdir()) == [cifar.archive]


def test_extracted_folder_is_read(cifar):
    cifar.write_folder()
    cifar.check()


def test_cifar_is_resized(cifar):
    cifar.write_archive()
    whole, half = (load_dataset(cifar.name, cifar.root, size).train for size in (32, 16))
    assert half.images.dtype == torch.uint8
    expected = TF.resize(whole.images.float(), [16, 16], antialias=True).round().to(torch.uint8)
    assert torch.equal(half.images, expected)


@pytest.mark.usefixtures("nothing_unpickled")
class TestAlteredCifar:
    def test_tampered_archive(self, cifar):
        members = cifar.members | {cifar.official.meta["filename"]: b"evil"}
        cifar.archive.write_bytes(pack(cifar.official, members))
        fails(cifar.name, cifar.root, "split.root", str(cifar.archive), "altered", "md5")

    @pytest.mark.parametrize("left", [0, 1, -1])
    def test_truncated_archive(self, cifar, left):
        cifar.archive.write_bytes(cifar.packed[:left])
        fails(cifar.name, cifar.root, "split.root", str(cifar.archive), cifar.official.url)

    def test_archive_that_is_a_folder(self, cifar):
        cifar.archive.mkdir()
        fails(cifar.name, cifar.root, str(cifar.archive))

    def test_trusted_archive_that_is_no_archive(self, cifar):
        cifar.archive.write_bytes(b"no archive")
        cifar.trust(b"no archive")
        fails(cifar.name, cifar.root, str(cifar.archive), "could not be extracted")

    def test_trusted_archive_with_a_wrong_member(self, cifar):
        name = cifar.official.test_list[0][0]
        packed = pack(cifar.official, cifar.members | {name: b"evil"})
        cifar.archive.write_bytes(packed)
        cifar.trust(packed)
        fails(cifar.name, cifar.root, name, str(cifar.archive))

    @pytest.mark.parametrize("change", ["tampered", "truncated", "missing"])
    @pytest.mark.parametrize("which", ["train", "test", "meta"])
    def test_altered_member(self, cifar, which, change):
        cifar.write_folder()
        cifar.write_archive()  # a good archive beside it excuses nothing
        official = cifar.official
        name = {
            "train": official.train_list[-1][0],
            "test": official.test_list[0][0],
            "meta": official.meta["filename"],
        }[which]
        member = cifar.folder / name
        if change == "missing":
            member.unlink()
        else:
            content = member.read_bytes()
            member.write_bytes(content[:-1] + b"!" if change == "tampered" else content[:-1])
        fails(cifar.name, cifar.root, "split.root", name, str(cifar.folder), official.url)


def test_no_network_says_what_to_get(cifar):
    root = cifar.root / "new"
    official = cifar.official
    fails(cifar.name, root, "split.root", "no network", official.url, official.tgz_md5, str(root))
    assert list(root.iterdir()) == []


URLOPEN = urllib.request.urlopen


def serve(monkeypatch, content: bytes, length: int, breaks: bool = False) -> None:
    class Response(io.BytesIO):
        def __init__(self, url: str) -> None:
            super().__init__(content)
            self.url, self.length = url, length

        def read(self, *args) -> bytes:
            if chunk := super().read(*args):
                return chunk
            if breaks:
                raise ConnectionResetError("connection reset")
            return b""

    monkeypatch.setattr(urllib.request, "urlopen", lambda request, **_: Response(request.full_url))


def test_download(cifar, monkeypatch):
    serve(monkeypatch, cifar.packed, len(cifar.packed))
    cifar.check()
    assert list(cifar.root.iterdir()) == [cifar.archive]


@pytest.mark.parametrize("breaks", [False, True])
def test_partial_download_does_not_stay(cifar, monkeypatch, breaks):
    serve(monkeypatch, cifar.packed[:100], len(cifar.packed), breaks)
    fails(cifar.name, cifar.root, "split.root", cifar.official.url, cifar.official.tgz_md5)
    assert list(cifar.root.iterdir()) == []


def test_a_server_that_says_nothing_is_given_up(cifar, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
    monkeypatch.setattr("permafrost.data.cifar._SILENCE", 0.5)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/archive"
        monkeypatch.setattr(cifar.official, "url", url)
        fails(cifar.name, cifar.root, "split.root", "timed out", url)
    assert list(cifar.root.iterdir()) == []


def test_official_checksums_are_in_force():
    assert CIFAR10.tgz_md5 == "c58f30108f718f92721af3b95e74349a"
    assert CIFAR100.tgz_md5 == "eb9058c3a382ffc7106e4002c42a8d85"
