"""The number format that training computes in."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def resolve_precision(wanted: Literal["float32", "bfloat16", "auto"], device: torch.device) -> str:
    """Return the format to train in on a device.

    Parameters
    ----------
    wanted : {"float32", "bfloat16", "auto"}
        ``auto``: bfloat16 where the device multiplies it faster than float32, as GPUs since Ampere
        and CPUs with AMX or AVX-512-BF16 do, and else float32.
    device : torch.device
        Where to train.

    Returns
    -------
    {"float32", "bfloat16"}
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # PyTorch tells this in no public way; all releases since 2.6 have these two.
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which convolutions and linear layers compute in this format.

    Weights, their gradients, statistics, losses and the optimizer's state stay float32 (PyTorch's
    autocast; mixed precision by Micikevicius et al. 2018).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
