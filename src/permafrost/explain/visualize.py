"""Filter visualisation: the image that a convolution filter answers to most strongly.

Activation maximisation as in Erhan, Bengio, Courville and Vincent, "Visualizing higher-layer
features of a deep network" (2009), section 3: gradient ascent on the image, weights held fixed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NoReturn, cast

import torch
from torch import Tensor, nn

from permafrost.devices import images_at_once
from permafrost.errors import NotFiniteError
from permafrost.explain._checks import check_type
from permafrost.explain._scopes import explaining
from permafrost.models.units import runs_as
from permafrost.stopping import stop_if_requested

Reduction = Literal["change", "intensity", "max"]
Shift = tuple[int, int]


class _LayerReached(Exception):
    """Carries a layer's input out of the forward pass, so that nothing above the input runs."""

    def __init__(self, below: Tensor):
        super().__init__()
        self.below = below


def start_image(
    size: int | tuple[int, int], mean: Sequence[float], std: Sequence[float], seed: int
) -> Tensor:
    """Draw the image that activation maximisation starts from.

    Parameters
    ----------
    size
        Side, or height and width, in pixels.
    mean, std
        Three channel means and standard deviations of images scaled to 0..1: the statistics that
        the network's inputs are normalised with.
    seed
        Seed of a generator of its own on the CPU, so that every device gets the same image and
        the global random state stays as it is.

    Returns
    -------
    Tensor
        (3, H, W), float32, normalised: grey noise, uniform in 150..180 of 255.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size
    grey = torch.empty(3, height, width, dtype=torch.float32)
    pixels = grey.uniform_(150, 180, generator=generator) / 255
    shift, scale = (
        torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std)
    )
    return (pixels - shift) / scale


def visualize_filters(
    model: nn.Module,
    layer: str,
    filters: Sequence[int] | None = None,
    *,
    start: Tensor,
    steps: int = 30,
    lr: float = 0.1,
    weight_decay: float = 1e-6,
    jitter: int = 0,
    jitter_seed: int = 0,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Maximise filters' mean activations, each by an image of its own (Erhan et al. 2009).

    The objective of filter f is the mean over positions of its convolution's output, before
    BatchNorm and activation, with the network in eval mode. Adam minimises the negative SUM of the
    objectives of a batch: every image then has the gradient that it would have alone, while a
    mean over the batch would shrink it against Adam's epsilon.

    All filters start from the same image: common noise keeps their pictures comparable. The picture
    of a dead filter (weights of zero, or nothing below it answers) is moved by weight decay alone;
    without that it is the start image.

    Parameters
    ----------
    model
        Network of images (N, 3, H, W). Only the layers below `layer` are run. Nothing of it is
        changed: training flags are put back, and no weight gets a gradient.
    layer
        Name of a convolution, as in ``model.named_modules()``.
    filters
        Indices of the filters to visualise, in this order; all of the layer's when None.
    start
        (3, H, W), the normalised start image (see `start_image`), on the model's device and in
        its floating-point type. Use float32 or float64: the rounding of shorter types changes the
        pictures of deep filters as much as another start image does.
    steps
        Number of Adam steps.
    lr, weight_decay
        Adam's learning rate and its L2 penalty on the image, in normalised pixel units.
    jitter
        Before each step the image is rolled by as many pixels at most in each direction, at random,
        and back after it: what hangs on single pixels is averaged out (Mordvintsev et al. 2015).
    jitter_seed
        Draws the shifts, the same for all filters.
    batch_size
        Most filters optimised together, by default as many as suit the device; 1 is run as 2. On a
        CPU it does not change the result: see Notes.
    on_batch
        Called after each batch with the number of filters that it finished.

    Returns
    -------
    Tensor
        (F, 3, H, W), in the units, type and device of `start`; not clipped to valid pixels.

    Raises
    ------
    ValueError
        If the layer or a filter does not exist, the forward pass does not run the layer, `start`
        is not (3, H, W) or `batch_size` is below 1.
    NotFiniteError
        If a picture is not finite, as those of weights that are not.

    Notes
    -----
    All batches of a call have the same size, at least 2: the last one is filled up by repeating its
    last filter. In float32 a batch of 1 takes other kernels on a CPU, whose rounding would show in
    the pictures of deep filters; batches of 2 and more agree bit for bit.

    In float32 a deep filter's picture is one of several that are equally right. The gradient jumps
    where a ReLU or the choice of a max pooling switches. Among the many units below a deep filter
    some come so close to their switch that rounding decides, and from there on two correct programs
    (another library, device or number of threads) take different paths. Filters on whose way no
    unit switches agree to rounding. Adam's epsilon has no part in it: gradients are far larger.

    Measured on VGG16-BN of width 0.25, trained on digits, between oneDNN's convolutions and
    PyTorch's own: of the second block's filters 15 to 34% have pictures that differ by more than
    0.01, of the last block's 63 to 70%, by up to 2.5 where pictures move by 3.0 at most. Spearman's
    correlation of their scores by MSE falls from 1.00 in the first two blocks to 0.77 in the
    deepest layer. Another start image changes more: 0.88 in the third block's first layer, none
    left in the deepest. In float64 the programs agree; on a CPU that takes three to four times as
    long. For pictures that anyone can recompute, pass the model and `start` in float64.
    """
    batch_size = batch_size if batch_size is not None else images_at_once(start, on_cpu=64)
    chosen = _check(model, layer, filters, start, batch_size)
    images = start.new_empty(len(chosen), *start.shape)
    shifts = _shifts(steps, jitter, jitter_seed)
    size = max(2, min(batch_size, len(chosen)))
    reached = cast(nn.Conv2d, model.get_submodule(layer))
    with explaining(model), _stopping_below(reached):
        for first in range(0, len(chosen), size):
            chunk = chosen[first : first + size]
            padding = [chunk[-1]] * (size - len(chunk))
            ascended = _ascend(model, reached, chunk + padding, start, shifts, lr, weight_decay)
            images[first : first + len(chunk)] = ascended[: len(chunk)]
            if on_batch is not None:
                on_batch(len(chunk))
    if not torch.isfinite(images).all():
        raise NotFiniteError(f"the pictures of layer {layer!r} are not all finite")
    return images


@torch.no_grad()
def natural_pictures(
    model: nn.Module,
    layers: Sequence[str],
    images_by_batches: Iterable[tuple[Tensor, Tensor]],
    strongest: int = 9,
) -> dict[str, Tensor]:
    """Average the images that filters answer to most strongly, in the place of maximised ones.

    Strong is what `visualize_filters` maximises: the mean over positions of the filter's
    convolution output, before BatchNorm and activation, with the network in eval mode.

    Parameters
    ----------
    model
        Network of images (N, 3, H, W); it is left as it is.
    layers
        Names of convolutions.
    images_by_batches
        Normalised images (N, 3, H, W), with labels that are not read; gone through twice.
    strongest
        How many images of each filter; all, where there are fewer.

    Returns
    -------
    dict of str to Tensor
        (F, 3, H, W) by layer, in the images' units.

    Raises
    ------
    ValueError
        If there are no images.
    """
    return _means(strongest_images(model, layers, images_by_batches, strongest), images_by_batches)


def strongest_images(
    model: nn.Module,
    layers: Sequence[str],
    images_by_batches: Iterable[tuple[Tensor, Tensor]],
    strongest: int,
) -> dict[str, Tensor]:
    """Find the images that filters answer to most strongly, as `natural_pictures` does.

    Returns
    -------
    dict of str to Tensor
        Places (F, K) of the images by layer, int64, the strongest first; K is `strongest` or, where
        there are fewer, the number of images.

    Raises
    ------
    ValueError
        If there are no images.
    """
    best: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0
    with _mean_answers(model, layers) as answers:
        for images, _ in images_by_batches:
            with explaining(model), torch.no_grad():
                model(images)
            for name, values in answers.items():
                best[name] = _strongest(best.get(name), values.T, count, strongest)
            count += len(images)
    if not best:
        raise ValueError("no images")
    return {name: places for name, (_, places) in best.items()}


@contextmanager
def _mean_answers(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, hold the means (N, F) over positions of what convolutions gave last."""
    answers: dict[str, Tensor] = {}

    def hold(name: str) -> Callable[..., None]:
        return lambda _m, _i, output: answers.update({name: output.mean((2, 3))})

    handles = [model.get_submodule(name).register_forward_hook(hold(name)) for name in layers]
    try:
        yield answers
    finally:
        for handle in handles:
            handle.remove()


def _strongest(
    before: tuple[Tensor, Tensor] | None, values: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return the greatest of each filter's values (F, K), and which images they are of."""
    places = torch.arange(first, first + values.shape[1], device=values.device)
    places = places.expand_as(values)
    if before is not None:
        values, places = torch.cat([before[0], values], 1), torch.cat([before[1], places], 1)
    found, chosen = values.topk(min(count, values.shape[1]), dim=1)
    return found, places.gather(1, chosen)


def _means(
    places: dict[str, Tensor], images_by_batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return the mean of the images of each filter, (F, 3, H, W), by layer."""
    sums: dict[str, Tensor] = {}
    first = 0
    for images, _ in images_by_batches:
        for name, chosen in places.items():
            if name not in sums:
                sums[name] = images.new_zeros(len(chosen), *images.shape[1:])
            filters, _ = (here := (chosen >= first) & (chosen < first + len(images))).nonzero().T
            sums[name].index_add_(0, filters, images[chosen[here] - first])
        first += len(images)
    return {name: total / places[name].shape[1] for name, total in sums.items()}


def heat_maps(images: Tensor, start: Tensor, reduction: Reduction = "change") -> Tensor:
    """Reduce filter pictures to one channel, to be compared with class saliency maps.

    Parameters
    ----------
    images
        (F, 3, H, W), pictures from `visualize_filters`, normalised pixel units.
    start
        (3, H, W), the start image that they grew from.
    reduction
        "change": mean over the channels of abs(image − start). "intensity": mean over the channels
        of the image itself, the grey picture. "max": maximum over the channels of
        abs(image − start).

    Returns
    -------
    Tensor
        (F, H, W); "change" and "max" are 0 or more, "intensity" has either sign.

    Raises
    ------
    ValueError
        If `reduction` is none of the three.

    Notes
    -----
    "change" is the default because a FullGrad map says how much each position contributes,
    whatever its sign. The comparable quantity is how much of the pattern lies at each position: a
    dark stroke belongs to a pattern as a bright one does. The difference also takes out the start
    image's noise, which all filters share and which would correlate every map with every other.
    """
    if reduction == "intensity":
        return images.mean(dim=1)
    change = (images - start).abs()
    if reduction == "change":
        return change.mean(dim=1)
    if reduction == "max":
        return change.amax(dim=1)
    raise ValueError(f"reduction {reduction!r}: must be 'change', 'intensity' or 'max'")


def _check(
    model: nn.Module, layer: str, filters: Sequence[int] | None, start: Tensor, batch_size: int
) -> list[int]:
    """Refuse what cannot be visualised; return the filters as a list."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if layer not in layers:
        raise ValueError(f"no convolution {layer!r} in the model; it has {', '.join(layers)}")
    if start.ndim != 3 or start.shape[0] != 3:
        raise ValueError(f"start must be (3, H, W), not {tuple(start.shape)}")
    check_type(start, "start")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    width = layers[layer].out_channels
    chosen = list(range(width)) if filters is None else [int(index) for index in filters]
    if any(not 0 <= index < width for index in chosen):
        raise ValueError(f"layer {layer!r} has filters 0 to {width - 1}; asked for {chosen}")
    return chosen


@contextmanager
def _stopping_below(layer: nn.Conv2d) -> Iterator[None]:
    """End every forward pass at `layer`, by a `_LayerReached` with its input."""

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> NoReturn:
        raise _LayerReached(inputs[0])

    handle = layer.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _ascend(
    model: nn.Module,
    layer: nn.Conv2d,
    filters: list[int],
    start: Tensor,
    shifts: Sequence[Shift],
    lr: float,
    weight_decay: float,
) -> Tensor:
    """Optimise one image for each filter; `_stopping_below` must be in force."""
    images = start.detach().repeat(len(filters), 1, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=lr, weight_decay=weight_decay)
    linear = runs_as(layer, nn.Conv2d)
    downhill: Tensor | None = None
    for down, right in shifts:
        stop_if_requested()
        shifted = images.roll((down, right), (2, 3)) if down or right else images
        below = _layer_input(model, shifted)
        if downhill is None or not linear:
            downhill = _downhill(layer, below.detach(), filters)
        # Gradients of the images alone: `backward` would fill the weights' too.
        (images.grad,) = torch.autograd.grad(below, images, downhill)
        optimizer.step()
    return images.detach()


def _shifts(steps: int, jitter: int, seed: int) -> list[Shift]:
    """Draw how far each step's image is rolled, down and to the right."""
    if jitter < 0:
        raise ValueError(f"jitter must be at least 0, not {jitter}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-jitter, jitter + 1, (steps, 2), generator=generator)
    return [(down, right) for down, right in drawn.tolist()]


def _downhill(layer: nn.Conv2d, below: Tensor, filters: list[int]) -> Tensor:
    """Return the negative gradient of each filter's objective at the layer's input.

    A convolution is linear, so that this is the same at every step, and the layer need run no more;
    of a subclass with a ``forward`` of its own it may change.
    """
    below.requires_grad_()
    # Without its hooks, which would stop it.
    objectives = layer.forward(below)[range(len(filters)), filters].mean(dim=(1, 2))
    (gradient,) = torch.autograd.grad(objectives.sum(), below)
    return -gradient


def _layer_input(model: nn.Module, images: Tensor) -> Tensor:
    try:
        # A copy, since a network may begin with an in-place operation.
        model(images.clone())
    except _LayerReached as reached:
        return reached.below
    raise ValueError("the model's forward pass does not run the layer to visualise, in eval mode")
