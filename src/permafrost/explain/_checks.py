"""What every explanation asks of images, targets, the logits of a model and what users return."""

from collections.abc import Sequence

import torch
from torch import Tensor

from permafrost.errors import InputError, NotFiniteError


def check_targets(images: Tensor, targets: Tensor | Sequence[int]) -> Tensor:
    """Return targets as int64 on the images' device; refuse what holds no whole numbers."""
    found = targets if isinstance(targets, Tensor) else _as_tensor(targets)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"targets must be whole numbers, int64, not {_name(found.dtype)}")
    return found.to(images.device, torch.int64)


def check_images(images: Tensor, targets: Tensor) -> None:
    """Refuse images that are not (N, 3, H, W), or too short, and targets that are not (N,)."""
    if images.ndim != 4 or targets.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"images must be (N, 3, H, W) and targets (N,), not {shapes}")
    check_type(images, "images")


def check_type(values: Tensor, what: str) -> None:
    """Refuse what is not float32 or longer."""
    if not values.is_floating_point() or values.dtype.itemsize < 4:
        raise ValueError(
            f"{what} must be float32 or float64, not {_name(values.dtype)}; "
            f"use model.float() and {what}.float()"
        )


def check_logits(logits: object, targets: Tensor, what: str = "targets") -> Tensor:
    """Refuse logits that are not (N, C) or not finite, and targets that are none of them."""
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model must return logits (N, C), not a {type(logits).__name__}; "
            "wrap it in a module that returns the logits alone"
        )
    if logits.ndim != 2 or len(logits) != len(targets):
        raise ValueError(f"the model must return logits (N, C), not {tuple(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise NotFiniteError("the model's logits are not all finite")
    check_range(targets, logits.shape[1], what)
    return logits


def check_maps(maps: Tensor) -> Tensor:
    """Refuse maps that are not finite; return them."""
    if not torch.isfinite(maps).all():
        raise NotFiniteError("the saliency maps are not all finite")
    return maps


def check_result(what: str, found: object, shape: tuple[int, ...]) -> Tensor:
    """Refuse what a function has returned unless it is a tensor of finite numbers of this shape."""
    if not isinstance(found, Tensor):
        raise InputError(f"{what} returned {type(found).__name__}, not a Tensor {shape}")
    if tuple(found.shape) != shape:
        raise InputError(f"{what} returned shape {tuple(found.shape)}, not {shape}")
    if not found.is_floating_point():
        raise InputError(f"{what} returned {found.dtype}, not floating-point numbers")
    if not torch.isfinite(found).all():
        raise NotFiniteError(f"{what} returned numbers that are not finite")
    return found.detach()


def check_range(labels: Tensor, classes: int, what: str) -> None:
    """Refuse labels that are not in 0..classes − 1."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{what} must lie in 0..{classes - 1}")


def _as_tensor(targets: Sequence[int]) -> Tensor:
    try:
        # No numbers at all would be float32.
        return torch.as_tensor(targets) if len(targets) else torch.zeros(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError("targets must be whole numbers (N,), one for each image") from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
