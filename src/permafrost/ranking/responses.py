"""Response criteria: how each filter responds to the images of each class, and what for.

The feature map of a filter is the output of the norm that takes its convolution's output, if there
is one, and else the convolution's output, in eval mode and before the ReLU; a norm that contains
its activation gives the map behind the activation. Data flow tells which norm that is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from permafrost.errors import NotFiniteError
from permafrost.explain._scopes import explaining
from permafrost.ranking.features import check_logits, feature_layers
from permafrost.ranking.relevance import FilterRelevance

RESPONSES = ("activation", "taylor", "fisher", "relevance")

# By criterion and layer: what each image gives, (N, F), or scores, (F, C).
_Values = dict[str, dict[str, Tensor]]


def filter_responses(
    model: nn.Module,
    images_by_batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    criteria: Sequence[str],
) -> dict[str, dict[str, Tensor]]:
    """Score the filters of every convolution for every class, in one pass over the batches.

    An image gives each filter a number, and a class's score is its mean over the class's images,
    summed in float64. With a the filter's feature map (H, W) and g = dL/da, where L is the cross
    entropy of the image's own true label, that number is

    - ``activation``: the mean of abs(a) over the positions;
    - ``taylor``: abs(mean of a * g over the positions), to first order the size of L's change
      when the filter is removed (Molchanov et al. 2017, equation 8: the absolute value is taken
      behind the mean over the positions and before that over the images);
    - ``fisher``: (sum of a * g over the positions)^2 / 2, whose mean over images is L's change
      when the filter is removed, to second order (Theis et al. 2018, Fisher pruning of feature
      maps);
    - ``relevance``: the sum over the positions of the relevance at the filter's output for the
      true label's logit, with its sign (:class:`FilterRelevance`). After Ede et al. (2022), who
      freeze the filters most relevant for a task, found by layer-wise relevance propagation; here
      all images given are the reference samples, each class has a score of its own, and how many
      filters freeze is left to the caller.

    The first three take one forward and one backward pass together.

    Parameters
    ----------
    model : nn.Module
        Network of images (N, 3, H, W) to logits (N, C) in which each convolution runs once, or not
        at all: what does not run in eval mode, such as GoogLeNet's auxiliary heads, is left out of
        the scores. It is run in eval mode; afterwards its weights, flags, gradients, hooks and
        attributes are as they were.
    images_by_batches : iterable of (Tensor, Tensor)
        Batches of images (N, 3, H, W), normalised and unaugmented, on the model's device, with
        labels (N,), a tensor or list of integers in 0..classes - 1.
    classes : int
        C.
    criteria : sequence of str
        Some of ``RESPONSES``.

    Returns
    -------
    scores : dict[str, dict[str, Tensor (F, C)]]
        By criterion and layer, in the order in which the layers run, of the images' type and
        device, without gradients; higher means that the class needs the filter more. 0 or more,
        except ``relevance``, which has any sign.

    Raises
    ------
    ValueError
        If a criterion is unknown, a class has no image, a label is out of range, an image is not
        finite, a convolution or the norm behind it runs twice, a BatchNorm keeps no running
        statistics (its images would depend on each other), the model does not return logits, or
        ``relevance`` is asked for and cannot explain the model (:class:`FilterRelevance`).
    NotFiniteError
        If a response is not finite.

    References
    ----------
    Molchanov, Tyree, Karras, Aila & Kautz, "Pruning convolutional neural networks for resource
    efficient inference", ICLR 2017.
    Theis, Korshunova, Tejani & Huszár, "Faster gaze prediction with dense networks and Fisher
    pruning", arXiv:1801.05787, 2018.
    Ede, Baghdadlian, Weber, Nguyen, Zanca, Samek & Lapuschkin, "Explain to not forget: defending
    against catastrophic forgetting with XAI", CD-MAKE 2022.
    """
    _check_request(model, criteria)
    layers: dict[str, str] = {}
    relevance = FilterRelevance(model) if "relevance" in criteria else None
    passes = any(criterion != "relevance" for criterion in criteria)
    sums: _Values = {criterion: {} for criterion in criteria}
    counts = torch.zeros(classes, dtype=torch.int64)
    for images, labels in images_by_batches:
        labels = _checked_labels(images, labels, classes)
        with explaining(model):
            layers = layers or feature_layers(model, images[:1])
        measured = _measure(model, layers, images, labels) if passes else {}
        if relevance is not None:
            measured["relevance"] = relevance(images, labels)
        # A matrix product adds up in a fixed order on every device; index_add_ does not.
        members = F.one_hot(labels, classes).double()
        for criterion, totals in sums.items():
            for layer in layers:
                totals[layer] = totals.get(layer, 0) + measured[criterion][layer].T @ members
        counts += torch.bincount(labels.cpu(), minlength=classes)
    missing = [label for label, count in enumerate(counts.tolist()) if count == 0]
    if missing:
        raise ValueError(f"classes without images: {missing}")
    return {
        criterion: _means(criterion, totals, counts, images.dtype)
        for criterion, totals in sums.items()
    }


def _means(
    criterion: str, totals: Mapping[str, Tensor], counts: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    means = {}
    for layer, total in totals.items():
        means[layer] = (total / counts.to(total.device)).to(dtype)
        if not torch.isfinite(means[layer]).all():
            raise NotFiniteError(f"'{criterion}' of layer '{layer}' is not finite")
    return means


def _measure(
    model: nn.Module, layers: Mapping[str, str], images: Tensor, labels: Tensor
) -> _Values:
    """Return each image's activation, taylor and fisher, (N, F) by layer, in float64."""
    with explaining(model), _recording(model, layers) as values:
        x = images.detach().clone().requires_grad_()
        # A copy, since a network may begin with an in-place operation. The loss is summed, so
        # that each image's gradient is that of its own loss.
        logits = check_logits(model(x.clone()), images, labels)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        # Only the input's gradient is asked for, so no weight gradient is computed.
        torch.autograd.grad(loss, x)
    return values


@contextmanager
def _recording(model: nn.Module, layers: Mapping[str, str]) -> Iterator[_Values]:
    """Within the block, note what `_measure` returns as both passes meet the feature maps."""
    values: _Values = {"activation": {}, "taylor": {}, "fisher": {}}

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        def forward(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
            if name in values["activation"]:
                raise ValueError(f"layer '{name}' runs more than once: it has no one feature map")
            feature_map = output.detach().clone()  # an in-place ReLU may follow
            values["activation"][name] = feature_map.abs().mean((2, 3), dtype=torch.float64)
            # What follows stays so where the loss does not depend on the layer.
            for criterion in ("taylor", "fisher"):
                values[criterion][name] = torch.zeros_like(values["activation"][name])

            # A hook on the tensor itself gives the gradient of the value as the layer returned
            # it, whatever overwrites it later.
            def backward(gradient: Tensor) -> None:
                effect = (feature_map * gradient).sum((2, 3), dtype=torch.float64)
                values["taylor"][name] = effect.abs() / gradient[0, 0].numel()
                values["fisher"][name] = effect.square() / 2

            if output.requires_grad:
                output.register_hook(backward)

        return layer.register_forward_hook(forward)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(watch(name, model.get_submodule(layer)))
        yield values


def _check_request(model: nn.Module, criteria: Sequence[str]) -> None:
    unknown = set(criteria) - set(RESPONSES)
    if unknown:
        raise ValueError(f"unknown: {sorted(unknown)}; criteria must be of {RESPONSES}")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if any(norm.running_mean is None or norm.running_var is None for norm in norms):
        raise ValueError("a BatchNorm without running statistics lets images depend on each other")


def _checked_labels(images: Tensor, labels: Tensor | Sequence[int], classes: int) -> Tensor:
    """Refuse a batch that does not fit; return its labels as indices."""
    labels = torch.as_tensor(labels, device=images.device)
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images must be (N, 3, H, W) and labels (N,), not {shapes}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}")
    if not torch.isfinite(images).all():
        raise ValueError("images hold values that are not finite")
    return labels.long()
