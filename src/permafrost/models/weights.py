"""Weights to begin with, from a file: what a network has learned elsewhere."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from permafrost.errors import InputError, one_line

# What a whole classifier has besides its body: its last layers, and auxiliary ones.
_NOT_OF_THE_BODY = ("fc.", "classifier.", "head.", "heads.", "aux", "AuxLogits.")
# How the body may be called in the file: as it is, or as a part of a network.
_PREFIXES = ("", "features.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights: safetensors, or a state dict that torch.save wrote.

    Nothing is unpickled but tensors.

    Parameters
    ----------
    path : Path
        Of a file whose name ends in ``.safetensors``, or of another for ``torch.load``.

    Raises
    ------
    InputError
        If it is absent, damaged, or no dict of names and tensors.
    """
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"model.weights: {path} is not there") from None
    except Exception as error:  # a damaged file makes either reader raise almost anything
        raise InputError(f"model.weights: {path} cannot be read ({one_line(error)})") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise InputError(f"model.weights: {path} is no state dict, of names and tensors")
    return found


def load_weights(features: nn.Module, weights: Mapping[str, Tensor], arch: str) -> None:
    """Load weights into a body; each of its tensors must be there, in its shape.

    Of a classifier's file the last layers are left out: a task's head begins anew.

    Parameters
    ----------
    features : nn.Module
        Changed in place.
    weights : mapping of str to Tensor
        By the names of the body, of torchvision's classifier or of a network of this package.
    arch : str
        The network's name, for messages.

    Raises
    ------
    InputError
        If they do not fit; names the first that does not.
    """
    wanted = {
        name: value
        for name, value in features.state_dict().items()
        if not name.endswith("num_batches_tracked")  # absent from old files
    }
    prefix = max(_PREFIXES, key=lambda prefix: sum(prefix + name in weights for name in wanted))
    for name, value in wanted.items():
        found = weights.get(prefix + name)
        if found is None:
            raise InputError(f"model.weights: has no {prefix}{name}, which {arch} needs")
        if found.shape != value.shape:
            raise InputError(
                f"model.weights: {prefix}{name} has the shape {tuple(found.shape)}, but in {arch} "
                f"{tuple(value.shape)} (a larger split.image_size may have the usual first layer)"
            )
    for name in weights:
        known = name.removeprefix(prefix) in features.state_dict() and name.startswith(prefix)
        if not known and not name.startswith(_NOT_OF_THE_BODY):
            raise InputError(f"model.weights: has {name}, which {arch} has not")
    features.load_state_dict({name: weights[prefix + name] for name in wanted}, strict=False)
