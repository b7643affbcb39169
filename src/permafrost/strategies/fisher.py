"""The diagonal of the Fisher information, from per-example gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from permafrost.models import measuring

# Gradients of so many numbers at once: a batch of images is split accordingly.
_NUMBERS_AT_ONCE = 1.5e7


def fisher_diagonal(
    model: nn.Module, images_by_batches: Iterable[tuple[Tensor, Tensor]], names: Iterable[str]
) -> dict[str, Tensor]:
    """Return F_i = mean over images of Σ_c p(c|x) (∂ log p(c|x) / ∂θ_i)².

    The expectation over the model's own softmax is exact, and every image has its own gradient: the
    square of a batch's mean gradient would be something else (Kunstner et al. 2019).

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
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: value.detach() for name, value in values.items()}
    wanted = {name: values.pop(name) for name in names}
    chunk = max(1, int(_NUMBERS_AT_ONCE / sum(value.numel() for value in wanted.values())))

    def log_probability(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**values, **parameters}, (image[None],))
        return F.log_softmax(logits, dim=1)[0].gather(0, label[None])[0]

    gradients = vmap(grad(log_probability), in_dims=(None, 0, None))
    sums = {name: torch.zeros_like(value) for name, value in wanted.items()}
    count = 0
    for images, _ in images_by_batches:
        for part in images.split(chunk):
            with measuring(model):
                with torch.no_grad():
                    probabilities = model(part).softmax(dim=1)
                for label, weights in enumerate(probabilities.T):
                    target = torch.tensor(label, device=part.device)
                    for name, values_ in gradients(wanted, part, target).items():
                        sums[name] += torch.tensordot(weights, values_.square(), dims=1)
            count += len(part)
    if count == 0:
        raise ValueError("no images")
    return {name: value / count for name, value in sums.items()}
