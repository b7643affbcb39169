"""The networks by name, and how one is built for the tasks that it is to learn."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from permafrost.errors import InputError, one_line
from permafrost.models.multihead import TaskNetwork
from permafrost.models.scopes import evaluating
from permafrost.models.weights import load_weights
from permafrost.registry import Registry
from permafrost.seeding import derive_seed

# Makes a body; takes what it names of image_size, width and batch_norm.
MakeNetwork = Callable[..., nn.Module]


class Networks(Registry[MakeNetwork]):
    """The networks, with those of whole libraries as ``library:name``."""

    libraries: dict[str, Callable[[str], MakeNetwork]]

    def __init__(self) -> None:
        remedy = "name a function that returns a torch.nn.Module"
        super().__init__("network", "permafrost.models", callable, remedy)
        self.libraries = {}

    def _own(self, name: str) -> MakeNetwork:
        library, _, name_there = name.partition(":")
        if library in self.libraries:
            return self.libraries[library](name_there)
        return super()._own(name)


NETWORKS = Networks()


def network(name: str) -> Callable[[MakeNetwork], MakeNetwork]:
    """Register a function that makes a network's body, under a name.

    The function takes those of these arguments that it names: ``image_size``, (height, width) in
    pixels; ``width``, a factor on the numbers of filters; ``batch_norm``, whether norms follow the
    convolutions. It returns a module that maps images (N, 3, H, W) to feature maps (N, D, h, w) or
    to features (N, D), without the last layer. Weights are drawn from PyTorch's global generator,
    which the caller has seeded.

    Parameters
    ----------
    name : str
        Of a network of the package. A user's own is found by its place, ``module:function``, and
        needs no decorator.
    """

    def register(function: MakeNetwork) -> MakeNetwork:
        NETWORKS.add(name, function)
        return function

    return register


def build_network(
    arch: str,
    *,
    classes: Sequence[int],
    seed: int,
    image_size: int | tuple[int, int] = 32,
    width: float = 1.0,
    batch_norm: bool = True,
    weights: Mapping[str, Tensor] | None = None,
) -> TaskNetwork:
    """Build a network with a head for each task, in float32.

    Parameters
    ----------
    arch : str
        A name in ``NETWORKS``, ``torchvision:NAME``, or a user's own, ``module:function``.
    classes : sequence of int
        How many classes each task has.
    seed : int
        Sets the initial weights. Those of the body and of a head depend on no later task.
    image_size : int or (int, int)
        Height and width of the images, in pixels.
    width : float
        Factor on the numbers of filters, > 0; each layer keeps at least one.
    batch_norm : bool
        Whether norms follow the convolutions.
    weights : mapping of str to Tensor, optional
        Of the body, by name, to begin with: see :func:`permafrost.models.weights.read_weights`.

    Raises
    ------
    InputError
        If ``arch`` is unknown, has no such width or norms, has no convolution, cannot take such
        images, or does not fit the weights.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    make = NETWORKS.find(arch)
    choices = _choices(arch, make, {"image_size": size, "width": width, "batch_norm": batch_norm})
    with torch.random.fork_rng(devices=[]), _default_float32():
        torch.manual_seed(derive_seed(seed, "weights"))
        features = _make(arch, make, choices)
        shape = _feature_shape(arch, features, size)
        built = TaskNetwork(features, shape[1], classes, is_pooled=len(shape) == 2)
    if weights is not None:
        load_weights(features, weights, arch)
    # The same numbers in the order that CPU and GPU convolutions are fastest in.
    return built.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@contextmanager
def _default_float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _choices(arch: str, make: MakeNetwork, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return what a function takes of what is wanted; what it cannot vary must be plain."""
    try:
        taken = inspect.signature(make).parameters
    except ValueError:  # of what is not written in Python
        taken = {}  # type: ignore[assignment]
    for name, plain in (("width", 1), ("batch_norm", True)):
        if name not in taken and wanted[name] != plain:
            raise InputError(f"model.{name}: {arch} cannot vary it; allowed: {str(plain).lower()}")
    return {name: value for name, value in wanted.items() if name in taken}


def _make(arch: str, make: MakeNetwork, choices: dict[str, Any]) -> nn.Module:
    try:
        features = make(**choices)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a user's own may fail in any way
        raise InputError(f"model.arch: {arch} cannot be made ({one_line(error)})") from error
    if not isinstance(features, nn.Module):
        raise InputError(
            f"model.arch: {arch} returns {type(features).__name__}; wanted: a torch.nn.Module"
        )
    if not any(isinstance(module, nn.Conv2d) for module in features.modules()):
        raise InputError(f"model.arch: {arch} has no Conv2d, whose filters could be ranked")
    return features


def _feature_shape(arch: str, features: nn.Module, size: tuple[int, ...]) -> torch.Size:
    """Return the shape of the features of two black images."""
    try:
        with evaluating(features), torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = features(torch.zeros(2, 3, *size))
    except (Exception, SystemExit) as error:
        raise InputError(
            f"model.arch: {arch} cannot take images of {size[0]} x {size[1]} pixels "
            f"({one_line(error)}); set split.image_size"
        ) from error
    is_wanted = isinstance(found, Tensor) and found.ndim in (2, 4) and len(found) == 2
    if not is_wanted:
        given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"model.arch: {arch} maps images to {given}; wanted: features (N, D), or feature maps "
            "(N, D, h, w), without the last layer"
        )
    return found.shape  # type: ignore[no-any-return]
