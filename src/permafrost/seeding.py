"""Seeds: every random draw comes from a generator whose seed is derived from its purpose."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part.

    Parameters
    ----------
    *parts : int or str
        What the draw is for, e.g. ``(seed, "order", task)``. Two purposes never share a stream.

    Returns
    -------
    int
        In 0 .. 2**63 - 1.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by :func:`derive_seed`: the same draws on every device."""
    return torch.Generator().manual_seed(derive_seed(*parts))
