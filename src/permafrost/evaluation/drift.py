"""How far the responses of filters move, frozen or not, while a later task is learned."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from permafrost.data import Batches
from permafrost.errors import NotFiniteError
from permafrost.models import measuring


@torch.no_grad()
def response_drift(
    before: nn.Module,
    after: nn.Module,
    batches: Batches,
    layers: list[str],
    *,
    batch_size: int = 128,
) -> dict[str, Tensor]:
    """Measure the relative change of every filter's response on the same images.

    A frozen weight row does not freeze its filter's response, since its input channels come from
    filters that may move. The drift of filter f is ‖z_after − z_before‖₂ / ‖z_before‖₂ over all
    images and positions, z its convolution's output in eval mode.

    Parameters
    ----------
    before, after : nn.Module
        The network before and after learning a task; of the same structure.
    batches : Batches
        Images of an earlier task.
    layers : list of str
        Names of convolutions.
    batch_size : int
        Images at once.

    Returns
    -------
    dict of str to Tensor, shape (F,)
        Drift, >= 0, per layer. A filter that gave no response before has 0 if it gives none now,
        else 1: all of its response is new.

    Raises
    ------
    NotFiniteError
        If a response is not finite; names the layer.
    """
    change: dict[str, Tensor] = {}
    size: dict[str, Tensor] = {}
    for images, _ in batches.ordered(batch_size):
        old, new = _responses(before, images, layers), _responses(after, images, layers)
        for name in layers:
            change[name] = change.get(name, torch.tensor(0.0)) + _energy(new[name] - old[name])
            size[name] = size.get(name, torch.tensor(0.0)) + _energy(old[name])
    for name in layers:
        if not torch.isfinite(change[name] + size[name]).all():
            raise NotFiniteError(f"a response of layer {name} is not finite")
    return {name: _relative(change[name], size[name]) for name in layers}


def mean_drift(drift: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Average drift over the frozen and over the live filters of all layers.

    Returns
    -------
    dict
        ``frozen`` and ``live``; None where there is no such filter.
    """
    frozen = torch.cat([values[masks[name]] for name, values in drift.items()])
    live = torch.cat([values[~masks[name]] for name, values in drift.items()])
    return {
        "frozen": frozen.mean().item() if len(frozen) else None,
        "live": live.mean().item() if len(live) else None,
    }


def _relative(change: Tensor, size: Tensor) -> Tensor:
    silent = size == 0
    known = (change / torch.where(silent, 1.0, size)).sqrt()
    return torch.where(silent, (change > 0).to(known.dtype), known)


def _energy(response: Tensor) -> Tensor:
    return response.double().square().sum((0, 2, 3)).cpu()


def _responses(model: nn.Module, images: Tensor, layers: list[str]) -> dict[str, Tensor]:
    with measuring(model), _recording(model, layers) as responses:
        model(images)
    return responses


@contextmanager
def _recording(model: nn.Module, layers: list[str]) -> Iterator[dict[str, Tensor]]:
    responses: dict[str, Tensor] = {}

    def record(name: str) -> object:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            responses[name] = output.clone()  # an in-place ReLU may follow

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [record(name) for name in layers]
    try:
        yield responses
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
