"""The diagonal of the Fisher information, from per-example gradients."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from permafrost.models import measuring
from permafrost.models.units import runs_as

# Gradients of so many numbers at once: a batch of images is split accordingly.
_NUMBERS_AT_ONCE = 1.5e7
_FEW_POSITIONS = 4

Sums = dict[str, Tensor]


def fisher_diagonal(
    model: nn.Module, images_by_batches: Iterable[tuple[Tensor, Tensor]], names: Iterable[str]
) -> dict[str, Tensor]:
    """Return F_i = mean over images of Σ_c p(c|x) (∂ log p(c|x) / ∂θ_i)².

    The expectation over the model's own softmax is exact, and every image has its own gradient: the
    square of a batch's mean gradient would be something else (Kunstner et al. 2019). Those of plain
    convolutions, linear layers and BatchNorms that run once are made of the layers' inputs and of
    the gradients at their outputs, all images at once; others by a pass for each image.

    Parameters
    ----------
    model : nn.Module
        Maps images (N, 3, H, W) to logits (N, C); run in eval mode, true float32 or longer.
    images_by_batches : iterable of (Tensor, Tensor)
        Images, normalised; their labels are not read.
    names : iterable of str
        Of the parameters.

    Returns
    -------
    dict of str to Tensor
        Of each parameter's shape, >= 0.

    Raises
    ------
    ValueError
        If there are no images.
    """
    held = dict(model.named_parameters())
    names = list(names)
    sums = {name: torch.zeros_like(held[name].detach()) for name in names}
    layers: dict[str, nn.Module] | None = None
    count = 0
    for images, _ in images_by_batches:
        with measuring(model):
            if layers is None:
                layers = _plain_layers(model, names, images)
            _add_plain(model, layers, images, sums)
            _add_others(model, _others(names, layers), images, sums)
        count += len(images)
    if count == 0:
        raise ValueError("no images")
    return {name: value / count for name, value in sums.items()}


def _plain_layers(model: nn.Module, names: list[str], images: Tensor) -> dict[str, nn.Module]:
    """Return the layers whose gradients have a closed form, and that run once."""
    holders = Counter(id(p) for layer in model.modules() for p in layer._parameters.values())
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if _is_plain(layer)
        and any(f"{name}.{part}" in names for part in ("weight", "bias"))
        and all(holders[id(p)] == 1 for p in layer.parameters())
    }
    runs: Counter[str] = Counter()
    handles = [
        layer.register_forward_hook(
            # Of a batch that is no longer of images, what an image gives cannot be told.
            lambda _, inputs, output, name=name: runs.update(
                {name: 1 if len(inputs[0]) == len(output) == 1 else 2}
            )
        )
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            model(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return {name: layer for name, layer in layers.items() if runs[name] == 1}


def _is_plain(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        own_way = layer.groups != 1 or layer.padding_mode != "zeros"
        return runs_as(layer, nn.Conv2d) and not own_way and not isinstance(layer.padding, str)
    if isinstance(layer, nn.BatchNorm2d):
        return runs_as(layer, _BatchNorm) and layer.running_mean is not None
    return runs_as(layer, nn.Linear)


def _others(names: list[str], layers: Mapping[str, nn.Module]) -> list[str]:
    return [name for name in names if name.rpartition(".")[0] not in layers]


def _add_plain(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, sums: Sums
) -> None:
    """Add what the images give of the layers' parameters."""
    if not layers:
        return
    with torch.enable_grad(), _adding(layers, sums):
        start = images.detach().clone().requires_grad_()
        logs = F.log_softmax(model(start), dim=1)
        # All gradients come multiplied by √p, their squares by p.
        for log, weights in zip(logs.T, logs.detach().exp().sqrt().T, strict=True):
            torch.autograd.grad(log, start, weights, retain_graph=True)


@contextmanager
def _adding(layers: Mapping[str, nn.Module], sums: Sums) -> Iterator[None]:
    """Within the block, each backward pass adds the squares of each image's gradients."""

    def ran(name: str, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            with torch.no_grad():
                for part, squares in _squares(layer, inputs.detach(), gradient):
                    if f"{name}.{part}" in sums:
                        sums[f"{name}.{part}"] += squares

        output.register_hook(add)

    handles = [
        layer.register_forward_hook(lambda m, i, o, name=name: ran(name, m, i[0], o))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _squares(layer: Any, inputs: Tensor, gradient: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield Σ_n g_n² of weight and bias, g_n an image's gradient, from that at the output."""
    if isinstance(layer, nn.Linear):
        back, values = (x.reshape(len(x), -1, x.shape[-1]).mT for x in (gradient, inputs))
        yield "weight", _outer_squares(back, lambda part: values[part], values.shape[1])
    else:
        back = gradient.flatten(2)
    yield "bias", back.sum(2).square().sum(0)
    if isinstance(layer, nn.Conv2d):
        geometry: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        width = layer.weight[0].numel()
        squares = _outer_squares(back, lambda part: F.unfold(inputs[part], *geometry), width)
        yield "weight", squares.view_as(layer.weight)
    elif not isinstance(layer, nn.Linear):
        mean, var = (s[:, None, None] for s in (layer.running_mean, layer.running_var))
        scaled = (inputs - mean) * (var + layer.eps).rsqrt()
        yield "weight", (gradient * scaled).sum((2, 3)).square().sum(0)


def _outer_squares(back: Tensor, values: Callable[[slice], Tensor], width: int) -> Tensor:
    """Return Σ_n (Σ_p b_nfp v_nkp)², (F, K), of gradients (N, F, P) and values (N, K, P)."""
    count, filters, positions = back.shape
    total = back.new_zeros(filters, width)
    # Of few positions as Σ_p≤q (2 - δ_pq) b_p b_q v_p v_q, one product for all images: the
    # gradients of single images, each as large as the weight, are never written.
    first, second = torch.triu_indices(positions, positions, device=back.device)
    few = positions <= _FEW_POSITIONS
    terms = len(first) if few else positions
    chunk = max(1, int(_NUMBERS_AT_ONCE / (terms * width + (0 if few else total.numel()))))
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        here, there = back[part], values(part)
        if few:
            here = here[..., first] * here[..., second] * torch.where(first == second, 1, 2)
            there = there[..., first] * there[..., second]
            total += here.movedim(1, 0).flatten(1) @ there.movedim(1, 0).flatten(1).T
        else:
            total += torch.bmm(here, there.mT).square_().sum(0)
    return total.clamp_(min=0)  # in sums of products rounding may leave less


def _add_others(model: nn.Module, names: list[str], images: Tensor, sums: Sums) -> None:
    """Add what the images give of any parameters, by a pass for each image and class."""
    if not names:
        return
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: value.detach() for name, value in values.items()}
    wanted = {name: values.pop(name) for name in names}
    chunk = max(1, int(_NUMBERS_AT_ONCE / sum(value.numel() for value in wanted.values())))

    def log_probability(parameters: Sums, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**values, **parameters}, (image[None],))
        return F.log_softmax(logits, dim=1)[0].gather(0, label[None])[0]

    gradients = vmap(grad(log_probability), in_dims=(None, 0, None))
    for part in images.split(chunk):
        with torch.no_grad():
            probabilities = model(part).softmax(dim=1)
        for label, weights in enumerate(probabilities.T):
            target = torch.tensor(label, device=part.device)
            for name, found in gradients(wanted, part, target).items():
                sums[name] += torch.tensordot(weights, found.square(), dims=1)
