"""Where to compute: threads, determinism, and which cards there are."""

import os
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from permafrost.errors import InputError

_IN_USE = 2**30  # bytes of a card's memory; its driver and a display take less


def prepare_device(wanted: str, threads: int) -> torch.device:
    """Fix threads and determinism, and return the device.

    Parameters
    ----------
    wanted : str
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or, of several, ``cuda:1`` and so on.
    threads : int
        Of PyTorch on the CPU.

    Raises
    ------
    InputError
        If a GPU is asked for and there is none.
    """
    torch.set_num_threads(threads)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device: no CUDA GPU was found; allowed here: auto, cpu")
    if device.type == "cuda":
        # On a CPU a fixed number of threads is enough, and the switch takes seconds to import.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # What no operation has written is read by none; to fill it first costs a launch each.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def images_at_once(images: Tensor, on_cpu: int) -> int:
    """Return how many images to compute together.

    A CPU is fastest with as many as its caches hold. On a GPU an operation takes the same few
    microseconds to begin for one image as for hundreds.

    Parameters
    ----------
    images : Tensor, shape (..., H, W)
        One or more of them, on their device.
    on_cpu : int
        How many on a CPU.
    """
    if not images.is_cuda:
        return on_cpu
    height, width = images.shape[-2:]
    return max(64, min(512, 512 * 32 * 32 // (height * width)))


def worker_devices(device: torch.device, workers: int) -> list[torch.device]:
    """Return a device for each worker: all cards in turn, or the CPU for all.

    A card of another model than the first is left out: a result depends on the model, so it would
    depend on which worker was free.

    Parameters
    ----------
    device : torch.device
        What was asked for.
    workers : int
        How many.
    """
    if device.type != "cuda":
        return [device] * workers
    names = [torch.cuda.get_device_name(card) for card in range(torch.cuda.device_count())]
    alike = [card for card, name in enumerate(names) if name == names[0]]
    if len(alike) < len(names):
        others = ", ".join(name for name in names if name != names[0])
        print(f"left out, since they are no {names[0]}: {others}", file=sys.stderr)
    return [torch.device("cuda", alike[worker % len(alike)]) for worker in range(workers)]


def tell_cards_in_use(devices: Iterable[torch.device]) -> None:
    """Tell each card whose memory others use: they slow the runs there, or keep them from fitting.

    What this process has on a card counts too; it is to be called before anything is computed.
    """
    for device in sorted({device for device in devices if device.type == "cuda"}, key=str):
        try:
            used = torch.cuda.device_memory_used(device)
        except Exception:  # whatever the driver's library lacks: it is only to be told
            return
        if used > _IN_USE:
            total = torch.cuda.get_device_properties(device).total_memory
            name, gib = torch.cuda.get_device_name(device), 2**30
            print(
                f"{device} ({name}): others use {used / gib:.1f} of its {total / gib:.1f} GiB; "
                "CUDA_VISIBLE_DEVICES names the cards to use",
                file=sys.stderr,
            )
