"""The number format that training computes in."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

from permafrost.errors import InputError
from permafrost.models.scopes import float32_as

Precision = Literal["float32", "tf32", "bfloat16"]


def resolve_precision(wanted: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Return the format to train in on a device.

    Parameters
    ----------
    wanted : {"float32", "tf32", "bfloat16", "auto"}
        ``auto``: bfloat16 where the device multiplies it faster than float32, as GPUs since Ampere
        and CPUs with AMX or AVX-512-BF16 do, and else float32.
    device : torch.device
        Where to train.

    Returns
    -------
    {"float32", "tf32", "bfloat16"}

    Raises
    ------
    InputError
        If ``tf32`` is wanted on a CPU.
    """
    if wanted == "tf32" and device.type != "cuda":
        raise InputError("train.precision: tf32 needs a GPU; allowed here: float32, bfloat16, auto")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # PyTorch tells this in no public way; all releases since 2.6 have these two.
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Return a context for a forward pass, in which layers compute in this format.

    With ``bfloat16`` weights, their gradients, statistics, losses and the optimizer's state stay
    float32 (PyTorch's autocast; mixed precision by Micikevicius et al. 2018).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def float32_of(precision: Precision) -> AbstractContextManager[None]:
    """Return a context for a whole step, in which float32 is multiplied as this format says.

    ``tf32``: as GPUs shorten it; else as it is, whatever the process's switches are.
    """
    return float32_as("tf32" if precision == "tf32" else "ieee")
