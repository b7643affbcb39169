"""Class scores: what filters are worth for each class, by showing the network its images."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from permafrost.errors import NotFiniteError
from permafrost.explain._checks import (
    check_images,
    check_logits,
    check_range,
    check_result,
    check_targets,
)
from permafrost.explain._scopes import explaining
from permafrost.ranking.criteria import (
    CRITERIA,
    EXPLAINED,
    RESPONSE,
    Explained,
    check_layers,
    needs_class_maps,
    needs_images,
)
from permafrost.ranking.features import feature_layers

Key = TypeVar("Key")
ImageBatches = Iterable[tuple[Tensor, Tensor]]


def filter_responses(
    model: nn.Module,
    images_by_batches: ImageBatches,
    classes: int,
    criteria: Collection[str],
    class_maps: Tensor | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Score the filters of every convolution for every class, by criteria that look at images.

    With a the filter's feature map (H, W), g = dL/da, where L is the cross entropy of the image's
    own true label, and h = df/da, where f is that label's logit, an image gives each filter

    - ``activation``: the mean of abs(a) over the positions;
    - ``taylor``: abs(mean of a * g over the positions) (Molchanov et al. 2017);
    - ``taylor_signed``: the mean of a * g over the positions;
    - ``fisher``: (sum of a * g over the positions)^2 / 2 (Theis et al. 2018);
    - ``gradient``: the sum of g^2 over the positions (Kang et al. 2022);
    - ``attribution``: abs(sum of a * h over the positions);
    - ``contrast``: the sum of a * h over the positions;
    - ``conductance``, ``fullgrad_terms``: :mod:`permafrost.ranking.paths`;
    - ``relevance``: the sum over the positions of the relevance at the filter's output for f
      (Ede et al. 2022; :class:`permafrost.ranking.FilterRelevance`), and ``relevance_normalized``
      the same as a share of the layer's,

    and a class's score is its mean over the class's images, summed in float64; of
    ``taylor_signed`` the absolute value of that, of ``contrast`` its distance from the mean of all
    classes, of ``gradient`` a multiple of its layer's mean. ``overlap`` compares mean maps with the
    classes' saliency maps, ``ablation`` silences filter by filter. All response criteria
    (:func:`permafrost.ranking.response_criterion`) take together one forward and one backward pass
    for L and one for f; each network criterion has passes of its own.

    Parameters
    ----------
    model : nn.Module
        Network of images (N, 3, H, W) to logits (N, C) in which each convolution runs once, or not
        at all: what does not run in eval mode, such as GoogLeNet's auxiliary heads, is left out of
        the scores. It is run in eval mode; afterwards its weights, flags, gradients, hooks and
        attributes are as they were.
    images_by_batches : iterable of (Tensor, Tensor)
        Batches of images (N, 3, H, W), normalised and unaugmented, on the model's device, with
        labels (N,), a tensor or list of integers in 0..classes - 1. What an iterator gives is kept
        in memory where criteria need it more than once.
    classes : int
        C.
    criteria : collection of str
        Some of ``RESPONSES``, or users' own.
    class_maps : Tensor, shape (C, H, W), optional
        The classes' saliency maps, for criteria that look at them.

    Returns
    -------
    scores : dict[str, dict[str, Tensor (F, C)]]
        By criterion and layer, in the order in which the layers run, of the images' type and
        device, without gradients; higher means that the class needs the filter more. 0 or more,
        except ``relevance``, ``relevance_normalized``, ``ablation`` and ``overlap``, which have any
        sign.

    Raises
    ------
    InputError
        If a criterion is unknown, or a user's own gives unusable scores.
    ValueError
        If a criterion looks at no images, or at class maps and there are none, a class has no
        image, a label is out of range, an image is not finite, a convolution or the norm behind it
        runs twice, a BatchNorm keeps no running statistics (its images would depend on each other),
        the model does not return logits, or ``relevance`` is asked for and cannot explain the
        model.
    NotFiniteError
        If a logit or a response is not finite.
    """
    _check_request(model, criteria, class_maps)
    functions = {name: CRITERIA.find(name) for name in criteria}
    together = {name: f for name, f in functions.items() if f.looks_at == RESPONSE}
    alone = {name: f for name, f in functions.items() if name not in together}
    if len(alone) + bool(together) > 1 and isinstance(images_by_batches, Iterator):
        images_by_batches = list(images_by_batches)
    found: dict[str, object] = {}
    if together:
        found |= _response_scores(together, model, images_by_batches, classes)
    for name, function in alone.items():
        with explaining(model):
            more = (class_maps,) if needs_class_maps(name) else ()
            found[name] = function(model, images_by_batches, classes, *more)
    return {name: _checked_scores(model, name, found[name], classes) for name in criteria}


def class_means(
    measure: Callable[[Tensor, Tensor], Mapping[Key, Tensor]],
    images_by_batches: ImageBatches,
    classes: int,
) -> dict[Key, Tensor]:
    """Average what each image gives each filter over the images of every class.

    Parameters
    ----------
    measure : callable
        Given images (N, 3, H, W) and labels (N,), int64, it returns numbers (N, F), by layer.
    images_by_batches : iterable of (Tensor, Tensor)
        Batches of images with labels.
    classes : int
        C.

    Returns
    -------
    means : dict of Tensor (F, C)
        By layer, of the images' type, summed in float64.

    Raises
    ------
    ValueError
        If a class has no image, a label is out of range, or an image is not finite.
    """
    sums: dict[Key, Tensor] = {}
    counts = torch.zeros(classes, dtype=torch.int64)
    for images, given in images_by_batches:
        labels = checked_labels(images, given, classes)
        # A matrix product adds up in a fixed order on every device; index_add_ does not.
        members = F.one_hot(labels, classes).double()
        for key, values in measure(images, labels).items():
            sums[key] = sums.get(key, 0) + values.double().T @ members
        counts += torch.bincount(labels.cpu(), minlength=classes)
    missing = [label for label, count in enumerate(counts.tolist()) if count == 0]
    if missing:
        raise ValueError(f"classes without images: {missing}")
    return {key: (total / counts.to(total.device)).to(images.dtype) for key, total in sums.items()}


def _response_scores(
    functions: Mapping[str, Any], model: nn.Module, batches: ImageBatches, classes: int
) -> dict[str, dict[str, Tensor]]:
    """Score by all response criteria in one pass over the batches."""
    layers: dict[str, str] = {}

    def measure(images: Tensor, labels: Tensor) -> dict[tuple[str, str], Tensor]:
        with explaining(model):
            layers.update(layers or feature_layers(model, images[:1]))
        found: dict[tuple[str, str], Tensor] = {}
        for of in EXPLAINED:
            part = {name: f for name, f in functions.items() if f.of == of}
            if part:
                found |= _measure(model, layers, part, of, images, labels)
        return found

    means = class_means(measure, batches, classes)
    return {
        name: {layer: _finished(function, means[name, layer]) for layer in layers}
        for name, function in functions.items()
    }


def _finished(function: Any, means: Tensor) -> Tensor:
    finished: Tensor = function.finish(means) if function.finish else means
    return finished


def _measure(
    model: nn.Module,
    layers: Mapping[str, str],
    functions: Mapping[str, Any],
    of: Explained,
    images: Tensor,
    labels: Tensor,
) -> dict[tuple[str, str], Tensor]:
    """Return what each image gives each filter, (N, F), by criterion and layer."""
    values: dict[tuple[str, str], Tensor] = {}

    def evaluate(layer: str, feature_map: Tensor, gradient: Tensor) -> None:
        for name, function in functions.items():
            with torch.no_grad():
                found = function(feature_map, gradient)
            what = f"criterion '{name}' of layer '{layer}'"
            values[name, layer] = check_result(what, found, tuple(feature_map.shape[:2]))

    watch(model, layers, of, images, labels, evaluate)
    return values


def watch(
    model: nn.Module,
    layers: Mapping[str, str],
    of: Explained,
    images: Tensor,
    labels: Tensor,
    evaluate: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Tell of each layer's feature map and gradient, in one forward and one backward pass.

    Parameters
    ----------
    model : nn.Module
        Run in eval mode.
    layers : mapping of str to str
        By any names, the modules whose outputs are the feature maps.
    of : {"loss", "logit"}
        What the gradients are of.
    images : Tensor, shape (N, 3, H, W)
        Any.
    labels : Tensor of int64, shape (N,)
        Right answers.
    evaluate : callable
        Given a layer's name, its feature map and its gradient, both (N, F, h, w).
    """
    with explaining(model), _watching(model, layers, evaluate):
        x = images.detach().clone().requires_grad_()
        # A copy, since a network may begin with an in-place operation. The losses are summed, so
        # that each image's gradient is that of its own loss.
        logits = check_logits(model(x.clone()), labels, "labels")
        if of == "loss":
            explained = F.cross_entropy(logits, labels, reduction="sum")
        else:
            explained = logits.gather(1, labels[:, None]).sum()
        # Only the input's gradient is asked for, so no weight gradient is computed.
        torch.autograd.grad(explained, x)


@contextmanager
def _watching(
    model: nn.Module, layers: Mapping[str, str], evaluate: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Within the block, tell of each layer's feature map and gradient as the passes meet them."""
    ran: set[str] = set()
    waiting: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        def forward(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
            if name in ran:
                raise ValueError(f"layer '{name}' runs more than once: it has no one feature map")
            ran.add(name)
            waiting[name] = output.detach().clone()  # an in-place ReLU may follow
            if output.requires_grad:
                # A hook on the tensor itself gives the gradient of the value as the layer returned
                # it, whatever overwrites it later.
                output.register_hook(lambda gradient: evaluate(name, waiting.pop(name), gradient))

        return layer.register_forward_hook(forward)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(watch(name, model.get_submodule(layer)))
        yield
        for name, feature_map in waiting.items():  # the loss does not depend on these
            evaluate(name, feature_map, torch.zeros_like(feature_map))


def _checked_scores(
    model: nn.Module, criterion: str, found: object, classes: int
) -> dict[str, Tensor]:
    """Refuse what is not scores (F, C) of convolutions; what runs is not known here."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    given = [layer for layer in found if layer in layers] if isinstance(found, Mapping) else []
    filters = {layer: layers[layer].out_channels for layer in given}
    return check_layers(criterion, found, filters, classes)


def _check_request(model: nn.Module, criteria: Collection[str], maps: Tensor | None) -> None:
    blind = [name for name in criteria if not needs_images(name)]
    if blind:
        raise ValueError(f"criterion '{blind[0]}' looks at no images")
    if maps is None and (wanting := [name for name in criteria if needs_class_maps(name)]):
        raise ValueError(f"criterion '{wanting[0]}' needs class maps")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if any(norm.running_mean is None or norm.running_var is None for norm in norms):
        raise ValueError("a BatchNorm without running statistics lets images depend on each other")


def checked_labels(images: Tensor, given: Tensor | Sequence[int], classes: int) -> Tensor:
    """Refuse a batch that does not fit; return its labels as indices."""
    labels = check_targets(images, given)
    check_images(images, labels)
    check_range(labels, classes, "labels")
    if not torch.isfinite(images).all():
        raise NotFiniteError("images hold values that are not finite")
    return labels
