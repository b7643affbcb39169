"""What a saliency method is, and which there are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast, overload

from torch import Tensor, nn

from permafrost.registry import Registry

Reading = Literal["layer", "channel"]


@dataclass(frozen=True)
class Decomposition:
    """Logits taken apart.

    Attributes
    ----------
    maps
        (N, H, W), the terms laid over the images.
    errors
        (N,), the relative errors of the sums, as `completeness_error` defines them.
    """

    maps: Tensor
    errors: Tensor


Decompose = Callable[[nn.Module, Tensor, Tensor, Reading], Decomposition]


class SaliencyMethod(Protocol):
    """A function of a model, images (N, 3, H, W) and targets (N,) to maps (N, H, W).

    Attributes
    ----------
    has_reading
        Whether it takes the keyword ``reading``.
    decompose
        What gives its maps together with the errors of a sum of terms; None if its terms do not
        add up to the logit.
    """

    has_reading: bool
    decompose: Decompose | None

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor, /, **options: Any) -> Any:
        """Return a map for each image."""
        ...


#: The saliency methods, by name.
SALIENCY_METHODS: Registry[SaliencyMethod] = Registry(
    "saliency method",
    "permafrost.explain",
    lambda thing: callable(thing) and hasattr(thing, "decompose"),
    "decorate it with saliency_method of permafrost.explain",
)

Function = TypeVar("Function", bound=Callable[..., Tensor])


@overload
def saliency_method(function: Function, /) -> Function: ...


@overload
def saliency_method(
    *, has_reading: bool = ..., decompose: Decompose | None = ...
) -> Callable[[Function], Function]: ...


def saliency_method(
    function: Any = None, /, *, has_reading: bool = False, decompose: Decompose | None = None
) -> Any:
    """Declare a saliency method: a function of model, images and targets to maps.

    Parameters
    ----------
    function
        Given the model, images (N, 3, H, W), normalised, and targets (N,), int64, it returns maps
        (N, H, W): how much each position counts for the target's logit. `saliency_maps` calls it
        with the model in eval mode, in true float32, and with gradients recorded. It leaves model
        and images as they are.
    has_reading
        Whether it takes the keyword ``reading``, as `fullgrad` does.
    decompose
        For a method whose terms add up to the logit: a function of model, images, targets and
        reading that returns a `Decomposition`.

    Returns
    -------
    callable
        The same function.

    Examples
    --------
    >>> @saliency_method
    ... def brightness(model, images, targets):
    ...     return images.mean(1)
    """

    def declare(function: Any) -> Any:
        method = cast(SaliencyMethod, function)
        method.has_reading, method.decompose = has_reading, decompose
        SALIENCY_METHODS.add(function.__name__, method)
        return function

    return declare if function is None else declare(function)
