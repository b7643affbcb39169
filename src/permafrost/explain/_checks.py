"""What every explanation asks of images, targets and the logits of a model."""

import torch
from torch import Tensor

from permafrost.errors import NotFiniteError


def check_images(images: Tensor, targets: Tensor) -> None:
    """Refuse images that are not (N, 3, H, W) and targets that are not (N,)."""
    if images.ndim != 4 or targets.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"images must be (N, 3, H, W) and targets (N,), not {shapes}")


def check_logits(logits: Tensor, targets: Tensor) -> None:
    """Refuse logits that are not (N, C) or not finite, and targets that are none of them."""
    if logits.ndim != 2:
        raise ValueError(f"the model must return logits (N, C), not {tuple(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise NotFiniteError("the model's logits are not all finite")
    check_range(targets, logits.shape[1], "targets")


def check_maps(maps: Tensor) -> Tensor:
    """Refuse maps that are not finite; return them."""
    if not torch.isfinite(maps).all():
        raise NotFiniteError("the saliency maps are not all finite")
    return maps


def check_range(labels: Tensor, classes: int, what: str) -> None:
    """Refuse labels that are not in 0..classes − 1."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{what} must lie in 0..{classes - 1}")
