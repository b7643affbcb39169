"""Where runs are trained: several cards, of one model or of two, some in use by others."""

from types import SimpleNamespace

import pytest
import torch

from permafrost import devices
from permafrost.devices import prepare_device, tell_cards_in_use, worker_devices
from permafrost.errors import InputError

H100, T4, CPU = "NVIDIA H100", "Tesla T4", torch.device("cpu")


@pytest.fixture
def cards(monkeypatch):
    """Return a function that has PyTorch see cards."""

    def see(*names, used=0):
        cuda = devices.torch.cuda
        monkeypatch.setattr(cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(cuda, "get_device_name", lambda card: names[torch.device(card).index])
        monkeypatch.setattr(cuda, "device_memory_used", lambda card: used)
        properties = SimpleNamespace(total_memory=80 * 2**30)
        monkeypatch.setattr(cuda, "get_device_properties", lambda card: properties)

    return see


def test_workers_take_all_cards_in_turn(cards, capsys):
    cards(H100, H100)
    found = worker_devices(torch.device("cuda"), 5)
    assert [device.index for device in found] == [0, 1, 0, 1, 0]
    assert worker_devices(CPU, 3) == [CPU] * 3
    assert not capsys.readouterr().err


def test_a_card_of_another_model_is_left_out_and_told(cards, capsys):
    """A run's result would depend on which worker was free."""
    cards(H100, T4, H100)
    found = worker_devices(torch.device("cuda"), 3)
    assert [device.index for device in found] == [0, 2, 0]
    assert capsys.readouterr().err == f"left out, since they are no {H100}: {T4}\n"


def test_a_card_that_others_use_is_told(cards, capsys):
    cards(H100, H100, used=12 * 2**30)
    tell_cards_in_use(worker_devices(torch.device("cuda"), 3))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"cuda:0 ({H100}): others use 12.0 of its 80.0 GiB; ")
    assert second.startswith("cuda:1 ")


@pytest.mark.parametrize("used", [0, 2**29])
def test_a_free_card_is_not_told(cards, capsys, used):
    cards(H100, used=used)
    tell_cards_in_use([CPU, *worker_devices(torch.device("cuda"), 3)])
    assert not capsys.readouterr().err


def test_without_the_drivers_library_nothing_is_told(cards, capsys, monkeypatch):
    def missing(card):
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    cards(H100)
    monkeypatch.setattr(devices.torch.cuda, "device_memory_used", missing)
    tell_cards_in_use(worker_devices(torch.device("cuda"), 1))
    assert not capsys.readouterr().err


def test_a_card_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    assert prepare_device("auto", 1) == CPU
    for wanted in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match="no CUDA GPU was found"):
            prepare_device(wanted, 1)


@pytest.mark.gpu
def test_the_memory_that_others_use_can_be_read():
    device = torch.device("cuda", 0)
    assert prepare_device("cuda:0", 1) == device
    kept = torch.zeros(2**28, device=device)  # 1 GiB
    assert torch.cuda.device_memory_used(device) > kept.nbytes
