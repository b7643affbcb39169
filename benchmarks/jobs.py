"""The jobs: what the library does, what one would run instead, and what a unit of each costs."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain
from benchmarks.measure import Job, Result
from permafrost.data import Batches, LabeledImages, Normalization, Task, TaskSequence
from permafrost.explain import conv_layers, fullgrad, start_image, visualize_filters
from permafrost.freezing import frozen_filters
from permafrost.models import TaskNetwork, build_network
from permafrost.ranking import METRICS, RESPONSES, evaluate_metric, filter_responses
from permafrost.ranking.criteria import RESPONSE
from permafrost.strategies import STRATEGIES, Keep, Lesson, common_parameters
from permafrost.strategies.fisher import fisher_diagonal
from permafrost.strategies.path_integral import INTEGRAL
from permafrost.training import TrainingConfig, cross_entropy, resolve_precision
from permafrost.training.loop import build_optimizer, train_epoch
from permafrost.training.steps import Batch, PlainStep, RecordedStep, Step, recorder

BATCH, CLASSES, SIZE = 64, 10, 32
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
STEPS = 30  # of a visualisation
_SAMPLED_STEPS = 2  # of them are timed, the same for both sides
_PAIRS = 20  # of a filter's and a class's map are timed one by one


def network(width: float = 1.0, classes: int = CLASSES) -> TaskNetwork:
    """Return a VGG16-BN."""
    return build_network("vgg16", width=width, batch_norm=True, classes=[classes] * 2, seed=0)


def random_images(count: int, size: int = SIZE) -> Tensor:
    """Return uint8 images (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, size, size), generator=generator).to(torch.uint8)


def random_batch(device: torch.device, count: int = BATCH, size: int = SIZE) -> Batch:
    """Return normalised images with labels."""
    images = (random_images(count, size).float() / 255 - 0.5) / 0.25
    labels = torch.arange(count) % CLASSES
    return Batch(images.to(device), labels.to(device), torch.arange(count), 1, 1)


def random_masks(net: nn.Module, share: float) -> dict[str, Tensor]:
    """Return masks that freeze a share of each layer's filters, drawn at random."""
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, layer in conv_layers(net).items():
        order = torch.randperm(layer.out_channels, generator=generator)
        masks[name] = order < round(share * layer.out_channels)
    return masks


def our_step(
    share: float, precision: str, device: torch.device, width: float = 1.0, size: int = SIZE
) -> Callable[[], object]:
    """Return one step of the library's training loop; a share of the filters is frozen."""
    net = network(width).to(device)
    masks = {n: m.to(device) for n, m in random_masks(net, share).items()} if share else {}
    config = TrainingConfig(precision=precision)
    frozen = frozen_filters(net, masks)
    frozen.__enter__()
    model = net.view("shared", 0, 1).train()
    optimizer = build_optimizer("sgd", model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0)
    batch = random_batch(device, size=size)
    take = as_taken(PlainStep(model, optimizer, cross_entropy, None, config.precision), device)

    def step(_scope: object = frozen) -> object:  # which would end with the last reference
        return train_epoch([batch], take, config.lr)

    return step


def plain_step(share: float, device: torch.device) -> Callable[[], object]:
    """Return the step that the library's is held against."""
    net = network().to(device, memory_format=torch.contiguous_format)
    frozen = {n: m.to(device) for n, m in random_masks(net, share).items()} if share else {}
    step = plain.training_step(net.view("shared", 0, 1), frozen)
    batch = random_batch(device)
    return lambda: step(batch.images, batch.labels)


def forward_operations(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return the operations of a forward pass, and of its first convolution alone."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    first = next(iter(conv_layers(model).values()))
    with FlopCounterMode(display=False) as of_first, torch.no_grad():
        first(images)
    return float(counter.get_total_flops()), float(of_first.get_total_flops())


def training_jobs(device: torch.device) -> list[Job]:
    """Return a step of the first and of the second task, in float32 and as ``auto`` chooses."""
    model = network().view("shared", 0, 1).eval()
    forward, first = forward_operations(model, random_batch(torch.device("cpu")).images)
    precisions = dict.fromkeys(["float32", resolve_precision("auto", device)])
    jobs = []
    for share, name, targets in (
        (0.0, "first-task step", ("1x", "1x; 3x with AMX")),
        (0.5, "second-task step, 50% frozen", ("1x", "1x; 3.5x with AMX")),
        (0.75, "second-task step, 75% frozen", ("1.25x", "1x; 4x with AMX")),
    ):
        for precision, target in zip(precisions, targets, strict=False):
            jobs.append(
                Job(
                    f"{name}, {precision}",
                    our_step(share, precision, device),
                    plain_step(share, device),
                    # Forward, to the inputs of all but the first layer, to the live weights.
                    operations=forward + forward - first + (1 - share) * forward,
                    precision=precision,
                    target=target,
                )
            )
    return jobs


# How much of a plain step's speed each method ought to keep, where that was decided.
METHODS = {
    "ewc": "",
    "si": "",
    "lwf": "0.67x",
    "packnet": "",
    "replay": "",
    "soft": "0.63x",
    "circuit": "0.63x",
    "afc": "0.63x",
    "lwm": "0.33x",
    "rrr": "0.5x",
}


class _AsTheyAre:
    """Ranks filters in their order."""

    def __call__(self, lesson: Lesson, frozen: object) -> dict[str, torch.Tensor]:
        return {}

    def orders(self, lesson: Lesson, *, by_chance: bool = False) -> dict[str, torch.Tensor]:
        layers = conv_layers(lesson.network)
        return {name: torch.arange(layer.out_channels) for name, layer in layers.items()}


def strategy_jobs(device: torch.device) -> list[Job]:
    """Return a step of the second task by each method, against a plain step that forgets."""
    precision = resolve_precision("auto", device)
    jobs = []
    for name, target in METHODS.items():
        step = strategy_step(name, precision, device)
        # What it adds to the method that it is built on, in the same precision.
        base = strategy_step("replay" if name == "rrr" else "finetune", precision, device)
        about = f"{name} step, against {'replay' if name == 'rrr' else 'fine-tuning'}, {precision}"
        jobs.append(Job(about, step, base, precision=precision, target=target))
    return jobs


def strategy_step(name: str, precision: str, device: torch.device) -> Callable[[], object]:
    """Return one step of the library's training loop, by a method with its defaults."""
    net, made = network().to(device), STRATEGIES[name]
    images = LabeledImages(random_images(BATCH), torch.arange(BATCH) % CLASSES)
    task = Task(tuple(map(str, range(CLASSES))), images, images, images)
    config = TrainingConfig(precision=precision)
    sequence = TaskSequence((task, task), Normalization(MEAN, STD))
    keep = Keep(fisher_images=2, buffer_images=BATCH)
    lesson = Lesson(net, 0, sequence, config, "multi", 0, device, keep, start=net.state_dict())
    zeros = {
        f"{INTEGRAL}{name}": torch.zeros_like(value)
        for name, value in common_parameters(net, "multi", 1).items()
    }
    memory = made.knowledge(replace(lesson, memory=zeros)) if made.knowledge else {}
    lesson = replace(lesson, learned=1, memory=memory)
    strategy = made.build("multi", made.defaults(), _AsTheyAre(), "full")
    *before, last = strategy.phases(lesson)
    for phase in before:  # what they decide, without training
        lesson = replace(lesson, start=copy.deepcopy(net.state_dict()))
        with strategy.while_learning(lesson, phase) as guard:
            pass
        lesson = replace(lesson, memory=strategy.after_phase(lesson, phase, guard))
    holding = strategy.while_learning(lesson, last)
    guard = holding.__enter__()
    model = lesson.view(1).train()
    optimizer = build_optimizer("sgd", model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0)
    take = as_taken(PlainStep(model, optimizer, guard.objective, guard.observer, precision), device)
    batch = random_batch(device)
    if guard.draw:
        batch = replace(batch, drawn=guard.draw(batch))

    def step(_scope: object = holding) -> object:  # which would end with the last reference
        return train_epoch([batch], take, config.lr)

    return step


def as_taken(step: PlainStep, device: torch.device) -> Step:
    """Return a step as the library takes it on a device."""
    record = recorder(device)
    return RecordedStep(step, BATCH, record) if record else step


def fisher_job(device: torch.device, count: int = 8) -> Job:
    """Return the Fisher information of a few images, against a loop over images and classes."""
    ours, theirs = (network().to(device).view("shared", 0, 1).eval() for _ in range(2))
    contiguous = theirs.to(memory_format=torch.contiguous_format)
    batch = random_batch(device, count)
    names = [name for name, _ in ours.named_parameters()]
    return Job(
        "Fisher information, an image",
        lambda: fisher_diagonal(ours, [(batch.images, batch.labels)], names),
        lambda: plain.fisher_diagonal(contiguous, batch.images[0]),
        units=count,
    )


def fullgrad_jobs(device: torch.device) -> list[Job]:
    """Return FullGrad against the authors' way, against grad-cam's, and against a bare pass."""
    from pytorch_grad_cam import FullGrad
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    ours, theirs = (network().to(device).view("shared", 0, 1).eval() for _ in range(2))
    contiguous = theirs.to(memory_format=torch.contiguous_format)
    batch = random_batch(device)
    forward, _ = forward_operations(ours, batch.images)
    images = batch.images[:4]
    package = FullGrad(contiguous, [])

    def run_package() -> None:
        for image, label in zip(images, batch.labels.tolist(), strict=False):
            package(image[None], [ClassifierOutputTarget(label)])

    def run_authors() -> None:
        for image, label in zip(images, batch.labels.tolist(), strict=False):
            plain.fullgrad(contiguous, image, label)

    def run_bare() -> None:
        x = batch.images.clone().requires_grad_()
        chosen = ours(x).gather(1, batch.labels[:, None]).sum()
        torch.autograd.grad(chosen, x)

    def run_ours(reading: str = "layer") -> Tensor:
        return fullgrad(ours, batch.images, batch.labels, reading=reading)

    units = {"units": BATCH, "operations": 2 * forward / BATCH}
    return [
        Job("FullGrad, an image, against the authors' way", run_ours, run_authors,
            their_units=len(images), target="8x", **units),
        Job("FullGrad, an image, against grad-cam", lambda: run_ours("channel"), run_package,
            their_units=len(images), target="8x", **units),
        Job("FullGrad, an image, against a bare pass", run_ours, run_bare,
            their_units=BATCH, target="0.71x", **units),
    ]  # fmt: skip


def criteria_jobs(device: torch.device) -> list[Job]:
    """Return the criteria that look at images, at a quarter of the width, against a bare pass.

    Responses are taken together, a network criterion by itself.
    """
    model = network(0.25).to(device).view("shared", 0, 1).eval()
    batch = random_batch(device)
    shown, maps = [(batch.images, batch.labels)], torch.rand(CLASSES, SIZE, SIZE, device=device)
    responses = [name for name, found in RESPONSES.items() if found.looks_at == RESPONSE]
    groups = {f"all {len(responses)} response criteria": responses}
    groups |= {f"criterion {name}": [name] for name in RESPONSES if name not in responses}

    def run_bare() -> None:
        x = batch.images.clone().requires_grad_()
        torch.autograd.grad(cross_entropy(model, replace(batch, images=x))[0], x)

    return [
        Job(
            f"{about}, an image, against a bare pass",
            lambda names=names: filter_responses(model, shown, CLASSES, names, maps),
            run_bare,
            units=BATCH,
            their_units=BATCH,
            target="0.33x" if len(names) > 1 else "",
        )
        for about, names in groups.items()
    ]


def visualize_jobs(device: torch.device) -> list[Job]:
    """Return the visualisation of a sample of each layer's filters, a job for each layer."""
    ours, theirs = (network().to(device).view("shared", 0, 1).eval() for _ in range(2))
    contiguous = theirs.to(memory_format=torch.contiguous_format)
    start = start_image(SIZE, MEAN, STD, 0).to(device)
    jobs = []
    for name, layer in conv_layers(ours).items():
        their_layer = contiguous.get_submodule(name)

        def run_ours(name: str = name) -> None:
            visualize_filters(ours, name, range(BATCH), start=start, steps=_SAMPLED_STEPS)

        def run_theirs(layer: nn.Conv2d = their_layer) -> None:
            plain.visualize_filter(contiguous, layer, 0, start, _SAMPLED_STEPS)

        # A unit is the whole layer, by its number of filters and the real number of steps.
        whole = layer.out_channels * STEPS / _SAMPLED_STEPS
        operations = _visualize_operations(ours, name, start) * layer.out_channels * STEPS
        jobs.append(
            Job(name, run_ours, run_theirs, BATCH / whole, 1 / whole, operations=operations)
        )
    return jobs


def _visualize_operations(model: nn.Module, name: str, start: Tensor) -> float:
    """Return the operations of one step of one filter: twice the layers below."""
    total = 0.0
    for other, layer in conv_layers(model).items():
        if other == name:
            break
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _m, i, _o, seen=seen: seen.append(i[0]))
        with torch.no_grad():
            model(start[None])
        handle.remove()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(seen[0])
        total += 2 * counter.get_total_flops()
    return total


def rank(layers: list[Tensor], classes: Tensor) -> None:
    """Score every filter of every layer by all metrics."""
    for metric in METRICS.values():
        for maps in layers:
            evaluate_metric(metric, maps, classes)


def rank_job() -> Job:
    """Return all metrics of all filters and classes, against a loop over pairs."""
    generator = torch.Generator().manual_seed(0)
    widths = [layer.out_channels for layer in conv_layers(network()).values()]
    layers = [torch.rand(width, SIZE, SIZE, generator=generator) for width in widths]
    classes = torch.rand(CLASSES, SIZE, SIZE, generator=generator)
    pairwise = plain.pair_metrics()

    def run_theirs() -> None:
        for metric in pairwise.values():
            for index in range(_PAIRS):
                metric(layers[-1][index], classes[index % CLASSES])

    everything = sum(widths) * CLASSES
    return Job(
        f"rank all filters ({len(METRICS)} metrics, {everything} pairs)",
        lambda: rank(layers, classes),
        run_theirs,
        their_units=_PAIRS / everything,
        target="100x",
    )


def data_job(device: torch.device, count: int = 10_000) -> Job:
    """Return an epoch of cropped, flipped and normalised images, against a DataLoader."""
    images, labels = random_images(count), torch.arange(count) % CLASSES
    batches = Batches(LabeledImages(images, labels), Normalization(MEAN, STD), device)

    def run_ours() -> None:
        for _ in batches.epoch(torch.Generator().manual_seed(0), BATCH, flip=True, padding=4):
            pass

    def run_theirs() -> None:
        for _ in plain.data_loader(images, labels, MEAN, STD, workers=2):
            pass

    return Job(f"epoch of data, {count} images", run_ours, run_theirs, target="20x")


def evaluation_job(device: torch.device) -> Job:
    """Return the measuring of test images, the same for both sides but for the memory format."""
    ours = network().to(device).view("shared", 0, 1).eval()
    theirs = network().view("shared", 0, 1).eval().to(device, memory_format=torch.contiguous_format)
    images = random_batch(device, 256).images

    @torch.no_grad()
    def run(model: nn.Module) -> Tensor:
        return model(images).argmax(1)

    return Job("test images, 256", lambda: run(ours), lambda: run(theirs))


def whole(
    name: str, parts: list[tuple[float, Result]], target: str, precision: str = "float32"
) -> Result:
    """Return a job that is made of others, each so many times, round by round.

    Parameters
    ----------
    name
        For the table.
    parts
        How many units of each.
    target
        For people to read.
    precision
        Of the parts that train.
    """
    rounds = range(min(len(part.ours) for _, part in parts))
    ours, theirs = (
        [sum(count * getattr(part, side)[round_] for count, part in parts) for round_ in rounds]
        for side in ("ours", "theirs")
    )
    counted = [(count, part.job.operations) for count, part in parts]
    operations = None
    if all(each is not None for _, each in counted):
        operations = sum(count * (each or 0.0) for count, each in counted)
    job = Job(name, lambda: None, operations=operations, precision=precision, target=target)
    return Result(job, ours, theirs)
