"""The methods beside freezing: their formulas by hand, and what each of them holds bit for bit."""

import copy
import math
from dataclasses import fields, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from permafrost.data import Batches, LabeledImages, normalize
from permafrost.freezing import current_weights
from permafrost.strategies import (
    INTEGRAL,
    RETRAIN,
    CriticalLayer,
    Ewc,
    Finetune,
    FragileLayer,
    Freeze,
    FreezeEwc,
    FreezeLwf,
    Guard,
    Keep,
    Learner,
    Lesson,
    Lwf,
    PackNet,
    PathIntegral,
    Phase,
    Progress,
    Replay,
    Si,
    common_parameters,
    ewc,
    fisher,
    layer_change,
    learner,
    lwf,
    replay,
)
from permafrost.strategies.ewc import fisher_memory
from permafrost.strategies.fisher import fisher_diagonal
from permafrost.strategies.lwf import TEACHER, distillation, teacher_memory
from permafrost.strategies.quadratic import CENTRE, PRECISION, penalised, remember
from permafrost.strategies.replay import buffer_memory
from permafrost.strategies.si import importance, integral_memory
from permafrost.training import Batch, TrainingConfig, TrainingDiverged, cross_entropy, fit, part_of

CPU = torch.device("cpu")
HEADS = ["shared", "multi", "expanding"]
SGD = TrainingConfig(epochs=2, lr=0.02, weight_decay=0.05, batch_size=4, padding=2, flip=True)
CONFIGS = {
    "sgd": SGD,
    "adam": replace(SGD, optimizer="adam", lr=0.01),
    "adamw": replace(SGD, optimizer="adamw", lr=0.01),
}


def random(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def make_stirred(make_network):
    """Return a builder of networks that answer firmly and of which no number is 0 or 1."""

    def build(heads=1.0, **options):
        network, draw = make_network(**options), random(1)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0, heads, generator=draw)
                    module.bias.normal_(0, heads, generator=draw)
                if isinstance(module, nn.Conv2d):
                    module.bias.normal_(0, 0.05, generator=draw)
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5, generator=draw)
                    module.bias.normal_(0.1, 0.2, generator=draw)
                    module.running_mean.normal_(0, 0.2, generator=draw)
                    module.running_var.uniform_(0.5, 1.5, generator=draw)
        return network.eval()

    return build


def make_lesson(network, sequence, learned, head="multi", config=SGD, **options):
    return Lesson(network, learned, sequence, config, head, 0, CPU, **options)


def learn(strategy, network, sequence, config=SGD, memory=None, on_epoch=None, **options):
    """Learn from the second task on, from the network's weights; return the progress."""
    course = Learner(sequence, config, head=strategy.head, seed=0, device=CPU, **options)
    progress = Progress(1, [None, course.measure(network, 1)], memory=memory or {})
    while progress.learned < len(sequence.tasks):
        course.learn_task(network, strategy, progress, on_epoch)
    return progress


def watched(strategy, note):
    """Return the strategy, telling ``note`` what is kept after each phase."""

    class Watched(type(strategy)):
        def after_phase(self, lesson, phase, guard):
            memory = super().after_phase(lesson, phase, guard)
            note(lesson, phase, memory)
            return memory

    return Watched(**{entry.name: getattr(strategy, entry.name) for entry in fields(strategy)})


def copied_state(network):
    return copy.deepcopy(network.state_dict())


def all_images(part, sequence):
    return normalize(part.images, sequence.normalization)


def one_batch(sequence, task, positions=None, epoch=1, step=1):
    train = sequence.tasks[task].train
    positions = torch.arange(len(train)) if positions is None else positions
    images = all_images(train, sequence)[positions]
    return Batch(images, train.labels[positions], positions, epoch, step)


def distance(left, right, names=None):
    """Return how far apart two states are."""
    names = names or [n for n, value in left.items() if value.is_floating_point()]
    return math.sqrt(sum((left[n] - right[n]).square().sum().item() for n in names))


# Fisher information


class TwoWeights(nn.Module):
    """Two classes; the logits are 2 x w0 and x w1, x the first number of the image."""

    def __init__(self, *weights):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights))

    def forward(self, images):
        return images[:, 0, 0, 0, None] * self.w * torch.tensor([2.0, 1.0])


def test_fisher_of_two_weights_by_hand():
    """The gradient of log p_c is 2 x (1[c = 0] - p_0) for w0, and x (1[c = 1] - p_1) for w1.

    Of an indicator the mean square distance from its mean is p (1 - p), so the information is
    4 x² p_0 p_1 and x² p_0 p_1. With w0 = w1 = log 3, p_0 is 3/4 at x = 1, and 9/10 at x = 2.
    """
    model = TwoWeights(math.log(3), math.log(3))
    images = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    unread = torch.full((2,), -1)
    (found,) = fisher_diagonal(model, [(images, unread)], ["w"]).values()
    mean = (1 * 3 / 16 + 4 * 9 / 100) / 2
    torch.testing.assert_close(found, torch.tensor([4 * mean, mean]))
    # Over the model's own answers a batch's mean gradient is 0; with labels it is something else.
    F.cross_entropy(model(images), torch.tensor([0, 0])).backward()
    assert not torch.allclose(model.w.grad.square(), found, rtol=0.1)


@pytest.fixture
def fisher_case(make_stirred):
    """Return a network with BatchNorms and in-place ReLUs in float64, images, and all names."""
    view = make_stirred(width=0.03, classes=3).double().view("shared", 0, 1)
    images = torch.randn(5, 3, 32, 32, generator=random(), dtype=torch.float64)
    return view, images, [name for name, _ in view.named_parameters()]


def test_fisher_is_what_a_loop_over_images_and_classes_finds(fisher_case):
    view, images, names = fisher_case
    found = fisher_diagonal(view, [(images, torch.zeros(5))], names)
    expected = {name: torch.zeros_like(value) for name, value in view.named_parameters()}
    of_batch = {name: torch.zeros_like(value) for name, value in view.named_parameters()}
    for label in range(3):
        logs = F.log_softmax(view(images), dim=1)[:, label]
        for log in logs:
            gradients = torch.autograd.grad(log, list(view.parameters()), retain_graph=True)
            for name, gradient in zip(names, gradients, strict=True):
                expected[name] += log.exp().detach() * gradient.square() / 5
        together = torch.autograd.grad((logs.exp().detach() * logs).mean(), list(view.parameters()))
        for name, gradient in zip(names, together, strict=True):
            of_batch[name] += gradient.square()
    assert list(found) == names
    for name in names:
        assert expected[name].max() > 0, name
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-18)
        assert not torch.allclose(found[name], of_batch[name], rtol=0.1, atol=0), name


@pytest.mark.parametrize("sizes", [[2, 3], [1] * 5, [5]])
def test_fisher_does_not_depend_on_the_batches(fisher_case, monkeypatch, sizes):
    view, images, names = fisher_case
    expected = fisher_diagonal(view, [(images, torch.zeros(5))], names)
    monkeypatch.setattr(fisher, "_NUMBERS_AT_ONCE", 1 if len(sizes) == 1 else 2e7)
    batches = ((part, torch.zeros(len(part))) for part in images.split(sizes))
    for name, value in fisher_diagonal(view, batches, names).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-18)


def test_fisher_leaves_the_model_alone(fisher_case, same_bits):
    view, images, names = fisher_case
    before = copied_state(view.train())
    some = fisher_diagonal(view, [(images, torch.zeros(5))], names[:3])
    assert list(some) == names[:3]
    assert same_bits(view.state_dict(), before)
    assert all(value.grad is None and value.requires_grad for value in view.parameters())
    assert not any(value.requires_grad for value in some.values())
    assert all(module.training for module in view.modules())
    with pytest.raises(ValueError, match="no images"):
        fisher_diagonal(view, [], names)


# Whose heads the first two tasks have in common with the third.
COMMON = {"shared": [0], "multi": [], "expanding": [0, 1]}


@pytest.mark.parametrize("head", HEADS)
def test_fisher_is_of_the_task_that_was_learned(make_stirred, make_sequence, head):
    network, sequence = make_stirred(tasks=3, width=0.03), make_sequence(tasks=3)
    memory = fisher_memory(make_lesson(network, sequence, 1, head))
    precision, centre = part_of(memory, PRECISION), part_of(memory, CENTRE)
    parameters = dict(network.named_parameters())
    held = {f"features.{name}" for name, _ in network.features.named_parameters()}
    held |= {f"heads.{index}.{part}" for index in COMMON[head] for part in ("weight", "bias")}
    assert set(precision) == set(centre) == held
    images = [(all_images(sequence.tasks[1].train, sequence), torch.zeros(8))]
    view, names = network.view(head, 1, 2), {p: name for name, p in parameters.items()}
    expected = fisher_diagonal(view, images, [name for name, _ in view.named_parameters()])
    for name, parameter in view.named_parameters():
        if names[parameter] in held:
            torch.testing.assert_close(precision[names[parameter]], expected[name])
    for name in held:
        assert precision[name].max() > 0
        assert torch.equal(centre[name], parameters[name])
    with torch.no_grad():
        network.features[0].weight.add_(1)
    assert not torch.equal(centre["features.0.weight"], network.features[0].weight)


def test_fisher_is_measured_on_as_many_images_as_are_kept(make_network, make_sequence, monkeypatch):
    seen = []

    def note(model, images_by_batches, names):
        seen.append(torch.cat([images for images, _ in images_by_batches]))
        return {}

    monkeypatch.setattr(ewc, "fisher_diagonal", note)
    network, sequence = make_network(tasks=3), make_sequence(tasks=3)
    lesson = make_lesson(network, sequence, 1, keep=Keep(fisher_images=5))
    for asked in (lesson, lesson, replace(lesson, seed=1), replace(lesson, keep=Keep())):
        fisher_memory(asked)
    train = all_images(sequence.tasks[1].train, sequence)
    drawn = [{int((train == image).flatten(1).all(1).nonzero()) for image in part} for part in seen]
    assert [len(part) for part in drawn] == [len(part) for part in seen] == [5, 5, 5, 8]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


# Path integral and importance


@pytest.mark.parametrize(
    ("momentum", "expected"),
    [
        # g = 2, 1.6, 1.28 and -2, -1.8, -1.62; every move is -0.1 g.
        (0.0, [0.1 * (4 + 2.56 + 1.6384), 0.1 * (4 + 3.24 + 2.6244)]),
        # g = 2, 1.6, 1.08 moved by 2, 2.6, 2.38; and -2, -1.8, -1.52 by -2, -2.8, -2.92.
        (0.5, [0.1 * (4 + 4.16 + 2.5704), 0.1 * (4 + 5.04 + 4.4384)]),
    ],
)
def test_path_integral_of_a_parabola_by_hand(momentum, expected):
    """Of a w0² / 2 + b w1² / 2 with a = 2, b = 1, from (1, -2), in three steps of 0.1."""
    weights = nn.Parameter(torch.tensor([1.0, -2.0]))
    integral = PathIntegral({"w": weights})
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=momentum)
    for _ in range(3):
        optimizer.zero_grad()
        (torch.tensor([2.0, 1.0]) * weights.square() / 2).sum().backward()
        integral.before_step()
        optimizer.step()
        integral.after_step()
    torch.testing.assert_close(integral.tensors["w"], torch.tensor(expected))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_path_integral_sums_to_what_the_loss_has_lost(make_stirred, make_sequence, momentum):
    network, sequence = make_stirred(batch_norm=False, width=0.05), make_sequence()
    view, whole = network.view("multi", 0, 1), one_batch(sequence, 0)
    integral = PathIntegral(dict(network.named_parameters()))
    before = cross_entropy(view, whole)[0].item()
    lr = 2e-4 * (1 - momentum)
    config = TrainingConfig(epochs=40, lr=lr, momentum=momentum, batch_size=8, padding=0)
    train = Batches(sequence.tasks[0].train, sequence.normalization, CPU)
    fit(view, train, config, generator=random(), observer=integral)
    lost = before - cross_entropy(view, whole)[0].item()
    assert lost > 0.01
    total = sum(value.sum().item() for value in integral.tensors.values())
    assert total == pytest.approx(lost, rel=0.03)
    assert integral.tensors["heads.1.weight"].eq(0).all()  # not trained: it has no gradient


def penalty_memory(network, precision=None, shift=0.0, seed=4):
    """Return precisions (drawn from 0.5..1.5 unless given) and centres at the weights + shift.

    Of what is kept of the first task whatever the head: its own is among it.
    """
    draw = random(seed)
    body = common_parameters(network, "shared", 1)
    return remember(
        {
            name: torch.rand(value.shape, generator=draw) + 0.5
            if precision is None
            else torch.full_like(value, precision)
            for name, value in body.items()
        },
        {
            name: value.detach() + shift * torch.randn(value.shape, generator=draw)
            for name, value in body.items()
        },
    )


@pytest.mark.parametrize("head", HEADS)
def test_si_records_the_gradient_of_the_loss_alone(make_stirred, make_sequence, head):
    network, sequence = make_stirred(batch_norm=False, tasks=3), make_sequence(tasks=3)
    memory = penalty_memory(network, shift=0.05)
    lesson = make_lesson(network, sequence, 1, head, memory=memory, start=copied_state(network))
    body, plain, whole = common_parameters(network, head, 2), [], []
    assert {int(name.split(".")[1]) for name in body if "heads" in name} == set(COMMON[head])

    with Si(head, 2.0).while_learning(lesson, Phase(1, 1)) as guard:

        def objective(model, batch):
            loss = cross_entropy(model, batch)[0]
            plain.append(torch.autograd.grad(loss, list(body.values())))
            return guard.objective(model, batch)

        class Naive:
            tensors = {name: torch.zeros_like(value) for name, value in body.items()}  # noqa: RUF012
            regularised = {name: torch.zeros_like(value) for name, value in body.items()}  # noqa: RUF012

            def before_step(self):
                guard.observer.before_step()
                whole.append([value.grad.clone() for value in body.values()])
                self.before = [value.detach().clone() for value in body.values()]

            def after_step(self):
                guard.observer.after_step()
                for i, (name, value) in enumerate(body.items()):
                    move = value.detach() - self.before[i]
                    self.tensors[name] -= plain[-1][i] * move
                    self.regularised[name] -= whole[-1][i] * move

        naive = Naive()
        config = replace(SGD, lr=0.01)
        fit(
            lesson.view(1),
            lesson.batches(1),
            config,
            generator=random(),
            objective=objective,
            observer=naive,
        )
    found = guard.observer.tensors
    assert len(plain) == 4
    assert set(found) == set(body)
    for name, expected in naive.tensors.items():
        scale = naive.regularised[name].abs().max().item()
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4 * scale)
        same = torch.allclose(found[name], naive.regularised[name], rtol=0.1, atol=0.1 * scale)
        assert same == (f"{PRECISION}{name}" not in memory)


def test_importance_by_hand():
    """max(0, ω) / (Δ² + 0.1)."""
    omega = {"w": torch.tensor([0.2, -0.3, 0.7])}
    start, end = {"w": torch.tensor([1.0, 0.0, 2.0])}, {"w": torch.tensor([0.5, 1.0, 2.0])}
    (found,) = importance(omega, start, end).values()
    torch.testing.assert_close(found, torch.tensor([0.2 / 0.35, 0.0, 7.0]))


@pytest.mark.parametrize("head", HEADS)
def test_importances_add_up_and_the_centre_is_the_last_tasks(make_stirred, make_sequence, head):
    network, sequence = make_stirred(tasks=3), make_sequence(tasks=3)
    start = copied_state(network)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.3)
    body = common_parameters(network, "shared", 1)
    omega = {name: torch.randn(value.shape, generator=random(2)) for name, value in body.items()}
    first = {f"{INTEGRAL}{name}": value for name, value in omega.items()}
    memory = integral_memory(make_lesson(network, sequence, 0, "shared", memory=first, start=start))
    with torch.no_grad():
        for value in network.parameters():
            value.sub_(0.5)
    body = common_parameters(network, head, 2)
    second = {name: torch.randn(value.shape, generator=random(3)) for name, value in body.items()}
    observer = PathIntegral(body)
    observer.tensors = second
    lesson = make_lesson(
        network,
        sequence,
        1,
        head,
        memory=memory,
        start={name: value + 0.5 for name, value in copied_state(network).items()},
    )
    merged = Si(head).after_phase(lesson, Phase(1, 1), Guard(observer=observer))
    heads = {int(n.split(".")[1]) for n in part_of(merged, PRECISION) if n.startswith("heads.")}
    assert heads == set(COMMON[head])
    for name, value in omega.items():
        one = value.clamp(min=0) / (0.3**2 + 0.1)
        torch.testing.assert_close(memory[f"{PRECISION}{name}"], one)
    for name, value in body.items():
        one = memory.get(f"{PRECISION}{name}", 0)  # nothing of a head that the task has added
        two = second[name].clamp(min=0) / (0.5**2 + 0.1)
        torch.testing.assert_close(merged[f"{PRECISION}{name}"], one + two)
        assert torch.equal(merged[f"{CENTRE}{name}"], value)
        if f"{CENTRE}{name}" in memory:
            assert not torch.equal(merged[f"{CENTRE}{name}"], memory[f"{CENTRE}{name}"])


# Quadratic penalties


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("method", "factor"), [(Ewc, 1.5), (Si, 3.0)], ids=["ewc", "si"])
def test_the_penalty_by_hand(make_stirred, make_sequence, method, factor, head):
    """EWC's is λ/2 Σ F (θ - θ*)², SI's c Σ Ω (θ - θ*)².

    The first head is pulled where the second task's answers depend on it, and no other.
    """
    network, sequence = make_stirred(), make_sequence()
    memory, batch = penalty_memory(network, shift=0.1), one_batch(sequence, 1)
    lesson = make_lesson(network, sequence, 1, head, memory=memory)
    with method(head, 3.0).while_learning(lesson, Phase(1, 1)) as guard:
        loss, logits, labels = guard.objective(lesson.view(1), batch)
    body = {n: p for n, p in network.named_parameters() if n.startswith("features.")}
    if head != "multi":
        body |= {f"heads.0.{name}": p for name, p in network.heads[0].named_parameters()}
    expected = cross_entropy(lesson.view(1), batch)[0] + factor * sum(
        (memory[f"{PRECISION}{n}"] * (value - memory[f"{CENTRE}{n}"]) ** 2).sum()
        for n, value in body.items()
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, lesson.view(1)(batch.images))
    assert torch.equal(labels, batch.labels)
    gradients = torch.autograd.grad(loss, list(body.values()))
    plain = torch.autograd.grad(cross_entropy(lesson.view(1), batch)[0], list(body.values()))
    for (name, value), found, without in zip(body.items(), gradients, plain, strict=True):
        pull = 2 * factor * memory[f"{PRECISION}{name}"] * (value - memory[f"{CENTRE}{name}"])
        assert pull.abs().max() > 0.01
        torch.testing.assert_close(found, without + pull, rtol=1e-4, atol=1e-5)
    free = list(network.heads[0 if head == "multi" else 1].parameters())
    loss = guard.objective(lesson.view(1), batch)[0]
    plain = cross_entropy(lesson.view(1), batch)[0]
    for pair in zip(
        torch.autograd.grad(loss, free, allow_unused=True),
        torch.autograd.grad(plain, free, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(*(torch.zeros(1) if g is None else g for g in pair))


@pytest.mark.parametrize("head", HEADS)
def test_the_penalties_of_several_tasks_pull_as_their_sum(make_stirred, make_sequence, head):
    network, sequence, strength = make_stirred(tasks=3), make_sequence(tasks=3), 7.0
    lesson = make_lesson(network, sequence, 0, head)
    first = fisher_memory(replace(lesson, head="shared"))  # it is kept once for all heads
    with torch.no_grad():  # a weight that no task needs is held nowhere, a weight of one there
        first[f"{PRECISION}features.0.weight"][0] = 0
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=random(5)))
    lesson = replace(lesson, learned=1, memory=first)
    second = fisher_memory(lesson)
    merged = Ewc(head, strength).after_phase(lesson, Phase(1, 1), Guard())
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=random(6)))
    view, batch = network.view(head, 2, 3), one_batch(sequence, 2)
    body = list(common_parameters(network, head, 2).values())
    lesson = replace(lesson, learned=2, memory=merged)

    def pull(memory):
        with_, without = (
            torch.autograd.grad(penalised(asked, strength / 2)(view, batch)[0], body)
            for asked in (replace(lesson, memory=memory), replace(lesson, memory={}))
        )
        return [a - b for a, b in zip(with_, without, strict=True)]

    assert Ewc(head, strength).after_phase(lesson, Phase(2, 1), Guard()) is merged  # the last
    for found, one, two in zip(pull(merged), pull(first), pull(second), strict=True):
        scale = found.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(found, one + two, rtol=1e-3, atol=1e-4 * scale + 1e-7)
    for name, value in part_of(merged, PRECISION).items():
        one, two = first.get(f"{PRECISION}{name}", 0), second[f"{PRECISION}{name}"]
        torch.testing.assert_close(value, one + two)
        unknown = value == 0
        centre = merged[f"{CENTRE}{name}"]
        assert torch.equal(centre[unknown], second[f"{CENTRE}{name}"][unknown])
        assert centre.isfinite().all()


def test_a_strong_penalty_keeps_the_answers_to_the_first_task(make_stirred, make_sequence):
    """Without BatchNorms, whose statistics no penalty holds, and with a head for each task."""
    network, sequence = make_stirred(heads=0.3, batch_norm=False, width=0.05), make_sequence()
    config = TrainingConfig(epochs=25, lr=0.001, batch_size=4, padding=0)
    precision = part_of(fisher_memory(make_lesson(network, sequence, 0)), PRECISION)
    top = max(value.max() for value in precision.values())
    precision = {name: (value / top).clamp(min=0.3) for name, value in precision.items()}
    memory = remember(precision, common_parameters(network, "multi", 1))
    # A step of momentum SGD on a parabola of curvature h is stable for lr · h < 2 (1 + momentum).
    # The steepest is λ under EWC and 2 c under SI, as the largest precision is 1; half of it here.
    bound = 2 * (1 + config.momentum) / config.lr
    images = all_images(sequence.tasks[0].test, sequence)
    before = network.view("multi", 0, 1)(images).detach()

    def change(strategy):
        trained = copy.deepcopy(network)
        learn(strategy, trained, sequence, config, memory)
        return (trained.view("multi", 0, 1)(images) - before).abs().max().item()

    plain = change(Finetune("multi"))
    assert plain > 0.5 * before.std()
    for strong in (Ewc("multi", bound / 2), Si("multi", bound / 4)):
        assert change(strong) < 0.05 * plain
    # Beyond the bound nothing is held at all.
    with pytest.raises(TrainingDiverged):
        change(Ewc("multi", 2 * bound))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "strategy",
    [method(head, 0.0) for method in (Ewc, Si, Lwf) for head in HEADS],
    ids=lambda strategy: f"{type(strategy).__name__}-{strategy.head}",
)
def test_a_strength_of_zero_is_fine_tuning_bit_for_bit(
    make_stirred, make_sequence, same_bits, strategy, optimizer
):
    """Under momentum and weight decay too; three tasks, so that all is made anew between."""
    network, sequence = make_stirred(tasks=3, width=0.03), make_sequence(tasks=3)
    memory = penalty_memory(network)
    if isinstance(strategy, Lwf):
        memory = teacher_memory(make_lesson(network, sequence, 0, strategy.head))
    plain, config = copy.deepcopy(network), replace(CONFIGS[optimizer], epochs=1)
    before = copied_state(network)
    progress = learn(strategy, network, sequence, config, memory)
    expected = learn(Finetune(strategy.head), plain, sequence, config)
    assert same_bits(network.state_dict(), plain.state_dict())
    assert progress.history == expected.history
    assert progress.rows == expected.rows
    assert not torch.equal(before["features.0.weight"], plain.features[0].weight)
    if isinstance(strategy, Lwf):
        assert set(progress.memory) == set(memory)
    else:
        held = common_parameters(network, strategy.head, 2)
        assert set(progress.memory) == {f"{part}{n}" for part in (PRECISION, CENTRE) for n in held}
    assert not same_bits(progress.memory, memory)


# PackNet


class Stage:
    """What there was when a phase of PackNet ended."""

    def __init__(self, strategy, lesson, phase, memory, images):
        self.phase, self.learned = phase.name, lesson.learned
        self.start = copy.deepcopy(lesson.start)
        self.end = copied_state(lesson.network)
        self.owners = {
            name.removeprefix("owner/"): value.clone()
            for name, value in memory.items()
            if name.startswith("owner/")
        }
        tasks = lesson.learned + (self.phase == "learn")
        self.answers = packed_answers(strategy, lesson.network, memory, images, tasks)


def packed_answers(strategy, network, memory, images, tasks):
    return [
        strategy.network_for(network, task, memory)
        .eval()
        .view(strategy.head, task, tasks)(images)
        .detach()
        for task in range(tasks)
    ]


@pytest.fixture(scope="module")
def packed():
    """Hold what was packed, for several tests to look at."""
    return {}


@pytest.fixture
def pack(packed, make_stirred, make_sequence):
    """Return a function that learns three tasks with PackNet, and what there was in between."""

    def run(head, optimizer="sgd", prune=0.6):
        key = (head, optimizer, prune)
        packed[key] = packed.get(key) or train(*key)
        return packed[key]

    def train(head, optimizer, prune):
        network, sequence = make_stirred(tasks=3, width=0.05), make_sequence(tasks=3)
        images = all_images(sequence.tasks[0].test, sequence)
        stages, packnet = [], PackNet(head, prune)

        def note(lesson, phase, memory):
            stages.append(Stage(packnet, lesson, phase, memory, images))

        progress = learn(watched(packnet, note), network, sequence, CONFIGS[optimizer])
        assert [(stage.learned, stage.phase) for stage in stages] == [
            (task, name) for task in (1, 2) for name in (RETRAIN, "learn")
        ]
        return network, progress, stages, images

    return run


@pytest.mark.parametrize("optimizer", list(CONFIGS))
@pytest.mark.parametrize("head", ["shared", "multi"])
def test_packnet_answers_old_tasks_with_the_same_bits(pack, head, optimizer):
    network, progress, stages, images = pack(head, optimizer)
    retrained, learned, again, last = (stage.answers for stage in stages)
    assert torch.equal(retrained[0], learned[0])
    assert torch.equal(retrained[0], again[0])
    assert torch.equal(retrained[0], last[0])
    assert torch.equal(again[1], last[1])
    # Pruning and training do move the others, and the network as it is answers otherwise.
    assert not torch.allclose(learned[1], again[1], atol=1e-3)
    assert not torch.allclose(network.view(head, 0, 3)(images), last[0], atol=1e-3)
    final = packed_answers(PackNet(head, 0.6), network, progress.memory, images, 3)
    assert all(torch.equal(a, b) for a, b in zip(final, last, strict=True))


@pytest.mark.parametrize("prune", [0.6, 1.0])
@pytest.mark.parametrize("head", ["shared", "multi"])
def test_packnet_answers_old_tasks_with_the_same_bits_while_it_learns(
    make_stirred, make_sequence, head, prune
):
    """Also where the first task has left every weight to the next."""
    network, sequence = make_stirred(width=0.05), make_sequence()
    images = all_images(sequence.tasks[0].test, sequence)
    packnet, answers = PackNet(head, prune), []

    def note(progress):
        if progress.phase == 1:
            answers.append(packed_answers(packnet, network, progress.memory, images, 2)[0])

    retrained = []
    spy = watched(packnet, lambda *kept: retrained.append(Stage(packnet, *kept, images).answers[0]))
    learn(spy, network, sequence, on_epoch=note)
    assert len(answers) == 2
    for answer in [*answers, retrained[1]]:
        assert torch.equal(answer, retrained[0])


def is_packed(name, value, head):
    return value.ndim == 4 or (head == "shared" and name == "heads.0.weight")


@pytest.mark.parametrize(("head", "prune"), [("shared", 0.6), ("multi", 0.6), ("shared", 0.3)])
def test_packnet_frees_the_least_share_of_each_layers_own_weights(pack, head, prune):
    network, _, stages, _ = pack(head, prune=prune)
    packed = {n for n, value in network.named_parameters() if is_packed(n, value, head)}
    assert len(packed) == 8 + (head == "shared")
    before = {n: torch.ones_like(network.get_parameter(n), dtype=torch.uint8) for n in packed}
    for stage in stages:
        assert set(stage.owners) == packed
        for name, owner in stage.owners.items():
            assert owner.shape == before[name].shape
            mine = before[name] == stage.learned
            if stage.phase == RETRAIN:
                assert torch.equal(owner[~mine], before[name][~mine])  # what others own is theirs
                freed = mine & (owner == 0)
                assert int(freed.sum()) == round(prune * int(mine.sum()))
                assert torch.equal(owner[mine & ~freed], before[name][mine & ~freed])
                size = stage.start[name].abs()
                if freed.any() and (mine & ~freed).any():
                    assert size[freed].max() <= size[mine & ~freed].min()
                assert stage.end[name][freed].eq(0).all()
            else:  # all that was free now has an owner, and nothing else has changed hands
                assert torch.equal(owner == stage.learned + 1, before[name] == 0)
                assert torch.equal(owner[before[name] != 0], before[name][before[name] != 0])
        before = stage.owners
    sizes = [sum((o == task).sum() for o in before.values()) for task in range(4)]
    assert sizes[0] == 0
    assert sum(sizes) == sum(owner.numel() for owner in before.values())
    assert min(sizes[1:]) > 0


@pytest.mark.parametrize("optimizer", list(CONFIGS))
@pytest.mark.parametrize("head", ["shared", "multi"])
def test_packnet_trains_only_what_is_the_tasks(pack, head, optimizer):
    """Kept weights when it is retrained, free ones when it learns; the rest with the first task."""
    network, _, stages, _ = pack(head, optimizer)
    for stage in stages:
        retraining = stage.phase == RETRAIN
        first = retraining and stage.learned == 1
        task = stage.learned - retraining  # whose head is trained
        for name, end in stage.end.items():
            start = stage.start[name].clone()
            if is_packed(name, end, head):
                owner = stage.owners[name]
                mine = owner == (stage.learned if retraining else stage.learned + 1)
                if retraining:
                    start[owner == 0] = 0
                assert torch.equal(start[~mine], end[~mine]), name
                assert (start != end)[mine].any(), name
            elif name.startswith("heads.") and head == "multi":
                assert torch.equal(start, end) == (name.split(".")[1] != str(task)), name
            elif name.startswith("heads.") and name != "heads.0.bias":
                assert torch.equal(start, end), name
            else:  # biases and BatchNorms, their statistics too
                assert torch.equal(start, end) == (not first), name
    assert any(name.endswith("running_var") for name in network.state_dict())


@pytest.mark.parametrize("head", ["shared", "multi"])
def test_packnet_keeps_the_accuracy_that_retraining_has_left(pack, head):
    _, progress, _, _ = pack(head)
    kept = {
        task: [row for row in progress.history if row["task"] == task and row["phase"] == RETRAIN]
        for task in (2, 3)
    }
    for task in (2, 3):
        assert [row["epoch"] for row in kept[task]] == [1]  # half a task's epochs
        for row in progress.rows[task:]:
            assert row[task - 2].overall == kept[task][-1][f"acc_task{task - 1}"]
    while_learning = [row for row in progress.history if row["phase"] == "learn"]
    assert len({row["acc_task1"] for row in while_learning}) == 1


def test_packnet_learns_the_second_task_with_the_free_weights(make_network, make_sequence):
    network, sequence = make_network(width=0.1), make_sequence(train=6)
    config = TrainingConfig(epochs=10, lr=0.05, batch_size=4, padding=0)
    Learner(sequence, config, head="shared", seed=0, device=CPU).learn_task(
        network, Finetune("shared"), Progress(0, [])
    )
    progress = learn(PackNet("shared"), network, sequence, config)
    learned = [row for row in progress.history if row["phase"] == "learn"]
    assert learned[-1]["train_accuracy"] == 1
    assert learned[-1]["train_loss"] < 0.3 * learned[0]["train_loss"]
    assert progress.rows[2][1].overall == 1
    assert progress.rows[2][0].overall == 1


# Learning without Forgetting


def test_distillation_by_hand():
    """With T = 2 the teacher is sure of the first class by 3/4, and the network by 1/5."""
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    logits = torch.tensor([[0.0, 2 * math.log(4)]])
    one = -(0.75 * math.log(0.2) + 0.25 * math.log(0.8))
    assert distillation([logits], teacher, 2.0).item() == pytest.approx(one)
    # At T = 1 these are 9/10 and 1/17.
    hard = -(0.9 * math.log(1 / 17) + 0.1 * math.log(16 / 17))
    assert distillation([logits], teacher, 1.0).item() == pytest.approx(hard)
    # Groups of any size add up, each with a softmax of its own; images are averaged.
    three = torch.zeros(1, 3)
    both = distillation([logits, three], torch.cat([teacher, three], 1), 2.0)
    assert both.item() == pytest.approx(one + math.log(3))
    even = torch.zeros(2, 2)
    images = distillation([torch.cat([logits, even])], torch.cat([teacher, even]), 2.0)
    assert images.item() == pytest.approx((one + 2 * math.log(2)) / 3)


@pytest.mark.parametrize("head", HEADS)
def test_the_teacher_is_the_old_networks_answer_to_the_plain_images(
    make_stirred, make_sequence, head
):
    classes = [2, 2, 2, 2] if head == "shared" else [2, 3, 2, 4]
    network, sequence = make_stirred(classes=classes), make_sequence(classes=classes)
    lesson = make_lesson(network.train(), sequence, 1, head)  # two tasks are learned
    before = copied_state(network)
    (answers,) = teacher_memory(lesson).values()
    images = all_images(sequence.tasks[2].train, sequence)
    network.eval()
    if head == "multi":
        expected = torch.cat([network.view(head, task, 2)(images) for task in (0, 1)], 1)
    else:
        expected = network.view(head, 0, 2)(images)
    assert answers.shape == (8, 2 if head == "shared" else 5)
    torch.testing.assert_close(answers, expected.detach())
    assert not answers.requires_grad
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())


def test_the_teachers_rows_go_with_their_images(make_stirred, make_sequence, monkeypatch):
    """Image i has the grey 20 i, by which it is known though the epoch is shuffled and cropped."""
    sequence = make_sequence(train=5)
    grey = torch.arange(10, dtype=torch.uint8)[:, None, None, None] * 20
    marked = LabeledImages(grey.expand(10, 3, 32, 32).contiguous(), torch.arange(10) % 2)
    tasks = (sequence.tasks[0], replace(sequence.tasks[1], train=marked))
    sequence = replace(sequence, tasks=tasks)
    rows = torch.randn(10, 2, generator=random(3))
    network, order = make_stirred(), []
    lesson = make_lesson(network, sequence, 1, memory={TEACHER: rows})
    monkeypatch.setattr(lwf, "distillation", lambda logits, teacher, _: note(logits, teacher))
    current = []

    def note(logits, teacher):
        images = (current[-1][:, 0, 16, 16] * 0.25 + 0.5) * 255 / 20
        index = images.round().long()
        order.extend(index.tolist())
        assert torch.equal(teacher, rows[index])
        return logits[0].sum() * 0

    with Lwf("multi").while_learning(lesson, Phase(1, 1)) as guard:

        def objective(model, batch):
            current.append(batch.images)
            return guard.objective(model, batch)

        fit(lesson.view(1), lesson.batches(1), SGD, generator=random(), objective=objective)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert order[:10] != list(range(10))


@pytest.mark.parametrize("head", HEADS)
def test_the_objective_of_lwf_by_hand(make_stirred, make_sequence, head):
    """Cross entropy by the new task's view, and what each old view answers at temperature 3."""
    classes = [2, 2, 2] if head == "shared" else [3, 2, 2]
    network, sequence = make_stirred(classes=classes), make_sequence(classes=classes)
    groups = {"shared": [2], "multi": [3, 2], "expanding": [5]}[head]
    rows = torch.randn(8, sum(groups), generator=random(3))
    lesson = make_lesson(network, sequence, 2, head, memory={TEACHER: rows})
    batch = one_batch(sequence, 2, torch.tensor([6, 1, 4]))
    with Lwf(head, 0.7, 3.0).while_learning(lesson, Phase(2, 1)) as guard:
        loss, logits, labels = guard.objective(lesson.view(2), batch)
    torch.testing.assert_close(logits, network.view(head, 2, 3)(batch.images))
    assert torch.equal(labels, batch.labels)
    expected = F.cross_entropy(logits, labels)
    for group, kept in enumerate(rows[[6, 1, 4]].split(groups, dim=1)):
        old = network.view(head, group, 2)(batch.images)
        targets = F.softmax(kept / 3, dim=1)
        expected = expected + 0.7 * F.cross_entropy(old / 3, targets)
    torch.testing.assert_close(loss, expected)


def test_old_heads_stay_and_pass_the_gradient_on(make_stirred, make_sequence):
    network, sequence = make_stirred(tasks=3), make_sequence(tasks=3)
    memory = teacher_memory(make_lesson(network, sequence, 1))
    lesson = make_lesson(network, sequence, 2, memory=memory)
    with torch.no_grad():  # so that its answers differ from the recorded
        for head in network.heads[:2]:
            head.weight.mul_(-1)
    batch, gradients, features = one_batch(sequence, 2), [], list(network.features.parameters())
    for weight in (0.0, 1.0):
        network.zero_grad()
        with Lwf("multi", weight).while_learning(lesson, Phase(2, 1)) as guard:
            guard.objective(lesson.view(2), batch)[0].backward()
        assert all(value.grad is None for head in network.heads[:2] for value in head.parameters())
        assert all(value.grad.ne(0).any() for value in network.heads[2].parameters())
        gradients.append([value.grad.clone() for value in features])
    old = [network.view("multi", task, 2)(batch.images) for task in (0, 1)]
    expected = torch.autograd.grad(distillation(old, memory[TEACHER], 2.0), features)
    for without, whole, kept in zip(*gradients, expected, strict=True):
        assert kept.abs().max() > 0
        torch.testing.assert_close(whole - without, kept, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", list(CONFIGS))
@pytest.mark.parametrize("method", ["lwf", "replay"])
def test_no_optimizer_moves_an_old_head(make_stirred, make_sequence, method, optimizer):
    network, sequence = make_stirred(tasks=3), make_sequence(tasks=3)
    lesson, before = make_lesson(network, sequence, 0), copied_state(network.heads)
    strategy, memory = {
        "lwf": (Lwf("multi", 5.0), teacher_memory),
        "replay": (Replay("multi"), buffer_memory),
    }[method]
    moved = []
    learn(
        watched(strategy, lambda *_: moved.append(copied_state(network.heads))),
        network,
        sequence,
        CONFIGS[optimizer],
        memory(lesson),
    )
    for index, (old, new) in enumerate([(before, moved[0]), (moved[0], moved[1])], start=1):
        for name in old:
            assert torch.equal(old[name], new[name]) == (name[0] != str(index)), name


@pytest.mark.parametrize(("head", "frozen"), [*((head, False) for head in HEADS), ("multi", True)])
def test_a_heavy_weight_keeps_the_recorded_answers(
    make_stirred, make_sequence, half_masks, head, frozen
):
    network, sequence = make_stirred(batch_norm=False, width=0.1), make_sequence()
    memory = teacher_memory(make_lesson(network, sequence, 0, head))
    images = all_images(sequence.tasks[1].train, sequence)
    targets = memory[TEACHER].softmax(1)
    config = TrainingConfig(epochs=20, lr=0.005, momentum=0.5, batch_size=8, padding=0)

    def error(weight):
        trained, strategy = copy.deepcopy(network), Lwf(head, weight, 1.0)
        if frozen:
            strategy = FreezeLwf(head, Freeze(head, half_masks), strategy)
        learn(strategy, trained, sequence, config, memory)
        return (trained.view(head, 0, 1)(images).softmax(1) - targets).abs().mean().item()

    plain = error(0.0)
    assert plain > 0.05
    assert error(5.0) < 0.4 * plain


# Critical and fragile layers


LAYERS = [0, 4, 8, 11, 15, 18, 22, 25]  # the convolutions among the features


def test_critical_freezing_takes_what_lies_before_the_first_of_the_most_changed():
    assert CriticalLayer("shared").frozen_layers([0.1, 0.3, 0.2]) == [0]
    assert CriticalLayer("shared").frozen_layers([0.1, 0.3, 0.2, 0.3]) == [0]
    assert CriticalLayer("shared").frozen_layers([0.1, 0.2, 0.3]) == [0, 1]
    assert CriticalLayer("shared").frozen_layers([0.4, 0.2, 0.4]) == []
    assert CriticalLayer("shared").frozen_layers([0.0, 0.0]) == []


def test_fragile_layers_are_the_most_changed_and_the_first_of_equals():
    changes = [0.1, 0.4, 0.2, 0.4, 0.3]
    for share, expected in [(0, []), (0.2, [1]), (0.4, [1, 3]), (0.6, [1, 3, 4]), (1, [*range(5)])]:
        assert FragileLayer("shared", share).frozen_layers(changes) == expected
    assert FragileLayer("shared", 0.5).frozen_layers([0.2] * 4) == [0, 1]
    assert FragileLayer("shared", 0.5).frozen_layers([0.1, 0.2, 0.2, 0.2]) == [1, 2]
    assert FragileLayer("shared", 0.5).frozen_layers([0.3, 0.2, 0.1]) == [0, 1]  # round(1.5)


def change_layer(network, layer):
    """Triple one convolution's maps; its BatchNorm takes that back, so that no other changes."""
    conv, norm = network.features[layer], network.features[layer + 1]
    with torch.no_grad():
        conv.weight.mul_(3)
        conv.bias.mul_(3)
        norm.running_mean.mul_(3)
        norm.running_var.mul_(9)


@pytest.mark.parametrize("learned", [1, 2])
@pytest.mark.parametrize("changed", [0, 3, 7])
@pytest.mark.parametrize("method", ["critical_layer", "fragile_layer"])
def test_the_changed_layer_is_found_and_the_trial_undone(
    make_stirred, make_sequence, same_bits, monkeypatch, method, changed, learned
):
    network, sequence = make_stirred(tasks=3), make_sequence(tasks=3)
    strategy = (
        CriticalLayer("multi") if method == "critical_layer" else FragileLayer("multi", 1 / 8)
    )
    frozen = list(range(changed)) if method == "critical_layer" else [changed]
    before, real, calls, measured = copied_state(network), fit, [], []

    def trial(model, *arguments, **options):
        calls.append(copied_state(network))
        if len(calls) % 2:
            change_layer(network, LAYERS[changed])
            return []
        return real(model, *arguments, **options)

    drift = layer_change.response_drift

    def note_drift(old, new, batches, layers):
        measured.append(drift(old, new, batches, layers))
        last = sequence.tasks[learned - 1].train
        assert torch.equal(batches.images, last.images)
        assert old.head is network.heads[learned - 1]
        assert same_bits(network.state_dict(), before)
        return measured[-1]

    def note(lesson, phase, memory):
        kept.append(dict(memory))
        if phase.name == "trial":
            assert same_bits(lesson.network.state_dict(), before)

    kept = []
    monkeypatch.setattr(learner, "fit", trial)
    monkeypatch.setattr(layer_change, "response_drift", note_drift)
    course = Learner(sequence, SGD, head="multi", seed=0, device=CPU)
    course.learn_task(network, watched(strategy, note), Progress(learned, []))
    (changes,) = measured
    for index, values in enumerate(changes.values()):
        assert values.mean().item() == pytest.approx(2.0 if index == changed else 0.0, abs=1e-3)
    assert list(kept[0]) == [f"features.{LAYERS[index]}" for index in frozen]
    assert all(mask.dtype == torch.bool and mask.all() for mask in kept[0].values())
    for index, layer in enumerate(LAYERS):
        for part in (layer, layer + 1):
            for name, value in network.features[part].state_dict().items():
                same = torch.equal(before[f"features.{part}.{name}"], value)
                assert same == (index in frozen), (part, name)


@pytest.mark.parametrize("strategy", [CriticalLayer("shared"), FragileLayer("shared", 0.5)])
def test_a_real_trial_is_undone_too(make_stirred, make_sequence, same_bits, strategy):
    """After it, the training is the one that plain freezing of those layers does."""
    network, sequence, seen = make_stirred(), make_sequence(), []
    before = copied_state(network)

    def note(lesson, phase, memory):
        seen.append((phase.name, copied_state(lesson.network), dict(memory)))

    plain = copy.deepcopy(network)
    progress = learn(watched(strategy, note), network, sequence)
    assert [name for name, *_ in seen] == ["trial", "learn"]
    assert same_bits(seen[0][1], before)
    assert [row["phase"] for row in progress.history] == ["trial", "trial", "learn", "learn"]
    masks = seen[0][2]
    expected = learn(Freeze("shared", lambda *_: masks), plain, sequence)
    assert same_bits(network.state_dict(), plain.state_dict())
    assert progress.history[2:] == expected.history
    tried = copy.deepcopy(network)
    tried.load_state_dict(before)
    # And the trial is plain training, though in another order.
    course = Learner(sequence, SGD, head="shared", seed=0, device=CPU)
    course.learn_task(tried, Finetune("shared"), Progress(1, []))
    assert progress.history[0]["train_loss"] != expected.history[0]["train_loss"]


# Replay


def buffered(memory, task):
    return memory[f"{task}/images"], memory[f"{task}/labels"]


@pytest.mark.parametrize(
    ("size", "per_class", "counts"),
    [(6, 4, [2, 2, 2]), (7, 4, [2, 2, 3]), (2, 4, [0, 1, 1]), (50, 4, [4, 4, 4])],
)
def test_the_buffer_is_balanced_and_drawn_from_training_images(
    make_network, make_sequence, size, per_class, counts
):
    sequence = make_sequence(tasks=3, classes=3, train=per_class)
    network = make_network(tasks=3, classes=3)
    lesson = make_lesson(network, sequence, 1, keep=Keep(buffer_images=size))
    memory = buffer_memory(lesson)
    assert set(memory) == {"1/images", "1/labels"}
    images, labels = buffered(memory, 1)
    assert sorted(torch.bincount(labels, minlength=3).tolist()) == counts
    train = sequence.tasks[1].train
    found = [(train.images == image).flatten(1).all(1).nonzero().item() for image in images]
    assert len(set(found)) == len(found) == min(size, len(train))
    assert torch.equal(train.labels[found], labels)
    assert images.dtype == torch.uint8
    again, other = buffer_memory(lesson), buffer_memory(replace(lesson, seed=1))
    assert torch.equal(again["1/images"], images)
    if size < len(train):
        assert not torch.equal(other["1/images"], images)


def test_the_buffer_of_classes_of_unequal_size(make_network, make_sequence):
    sequence = make_sequence(classes=3, train=6)
    train = sequence.tasks[0].train
    chosen = torch.tensor([0, 6, 7, 8, 12, 13, 14, 15, 16])  # 1, 3 and 5 images
    task = replace(
        sequence.tasks[0], train=LabeledImages(train.images[chosen], train.labels[chosen])
    )
    lesson = make_lesson(
        make_network(classes=3), replace(sequence, tasks=(task,)), 0, keep=Keep(buffer_images=6)
    )
    _, labels = buffered(buffer_memory(lesson), 0)
    assert torch.bincount(labels).tolist() in ([1, 2, 3], [1, 3, 2])


@pytest.mark.parametrize("head", HEADS)
def test_every_step_learns_old_images_by_their_own_tasks_outputs(
    make_stirred, make_sequence, monkeypatch, head
):
    """With BatchNorm in eval mode, one pass over all images is as good as one for each task."""
    network, sequence = make_stirred(tasks=3), make_sequence(tasks=3)
    keep = Keep(buffer_images=6)
    lesson = make_lesson(network, sequence, 1, head, keep=keep)
    memory = buffer_memory(replace(lesson, learned=0)) | buffer_memory(lesson)
    lesson = replace(lesson, learned=2, memory=memory)
    drawn, real = [], replay._draw

    def draw(*arguments):
        for images, labels in real(*arguments):
            drawn.append((images, labels))
            yield images, labels

    monkeypatch.setattr(replay, "_draw", draw)
    batch = one_batch(sequence, 2, torch.tensor([0, 5, 6, 3, 7]))
    batch = replace(batch, labels=batch.labels + network.label_offset(head, 2))
    view = network.view(head, 2, 3).eval()
    with Replay(head).while_learning(lesson, Phase(2, 1)) as guard:
        loss, logits, labels = guard.objective(view, batch)
        first, drawn[:] = [images.clone() for images, _ in drawn], []
        guard.objective(view, batch)
        same, drawn[:] = [images.clone() for images, _ in drawn], []
        guard.objective(view, replace(batch, step=2))
        other, drawn[:] = [images.clone() for images, _ in drawn], []
        guard.objective(view, replace(batch, epoch=2))
        later, drawn[:] = [images.clone() for images, _ in drawn], []
        guard.objective(view, batch)
    torch.testing.assert_close(logits, view(batch.images))
    assert torch.equal(labels, batch.labels)
    assert len(drawn) == 2
    losses = []
    for task, (images, own) in enumerate(drawn):
        assert len(images) == 2  # together about as many as the new ones
        mine = network.label_offset(head, task)
        losses.append(F.cross_entropy(network.view(head, task, 3)(images), own + mine))
    expected = F.cross_entropy(view(batch.images), batch.labels) + sum(losses) / 2
    torch.testing.assert_close(loss, expected)
    # A step draws the same images each time it is taken, and every step others.
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    for strangers in (other, later):
        assert any(not torch.equal(a, b) for a, b in zip(first, strangers, strict=True))


def test_replayed_images_come_from_the_buffer_with_their_labels(
    make_stirred, make_sequence, monkeypatch
):
    network, sequence = make_stirred(), make_sequence()
    lesson = make_lesson(network, sequence, 0, keep=Keep(buffer_images=4))
    memory, drawn, real = buffer_memory(lesson), [], replay._draw

    def draw(*arguments):
        for images, labels in real(*arguments):
            drawn.append((images, labels))
            yield images, labels

    monkeypatch.setattr(replay, "_draw", draw)
    learn(Replay("multi"), network, sequence, replace(SGD, padding=0, flip=False), memory)
    images, labels = buffered(memory, 0)
    images = normalize(images, sequence.normalization)
    assert len(drawn) == 4
    for step, own in drawn:
        index = [(images == image).flatten(1).all(1).nonzero().item() for image in step]
        assert sorted(index) == [0, 1, 2, 3]
        assert torch.equal(labels[index], own)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *((name, "multi") for name in ("replay", "packnet", "critical_layer", "freeze_ewc")),
        *(("si", head) for head in HEADS),
    ],
)
def test_a_training_resumes_to_the_same_bits(
    make_stirred, make_sequence, make_strategy, same_bits, name, head
):
    """In several phases, in a network that is otherwise new."""
    sequence, stored = make_sequence(tasks=3), []
    strategy = make_strategy(name, head)
    network = make_stirred(tasks=3, width=0.03)
    lesson = make_lesson(network, sequence, 0)
    memory = {"replay": buffer_memory, "packnet": lambda _: {}, "critical_layer": lambda _: {}}.get(
        name, lambda lesson: penalty_memory(lesson.network)
    )(lesson)
    straight = learn(
        strategy,
        network,
        sequence,
        memory=memory,
        on_epoch=lambda progress: stored.append(copy.deepcopy(progress)),
    )
    assert len(stored) == len(straight.history) >= 4
    for progress in stored[::3]:
        again = make_stirred(tasks=3, width=0.03, seed=8)
        course = Learner(sequence, SGD, head=head, seed=0, device=CPU)
        while progress.learned < 3:
            course.learn_task(again, strategy, progress)
        assert same_bits(again.state_dict(), network.state_dict())
        assert progress.history == straight.history
        assert progress.rows == straight.rows
        assert same_bits(progress.memory, straight.memory)


# Frozen filters with a second method


def frozen_rows(network, masks):
    """Yield all tensors that belong to the masks' filters, frozen and live rows apart."""
    state = network.state_dict()
    for name, mask in masks.items():
        norm = f"features.{int(name.split('.')[1]) + 1}"
        for tensor in [f"{name}.weight", f"{name}.bias"] + [
            f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")
        ]:
            yield tensor, state[tensor][mask].clone(), state[tensor][~mask].clone()


@pytest.mark.parametrize("optimizer", list(CONFIGS))
@pytest.mark.parametrize("method", ["freeze_ewc", "freeze_lwf"])
def test_frozen_filters_keep_their_bits_beside_a_second_method(
    make_stirred, make_sequence, half_masks, same_bits, method, optimizer
):
    network, sequence = make_stirred(), make_sequence()
    config, masks = CONFIGS[optimizer], half_masks(network)
    freeze = Freeze("multi", half_masks)
    if method == "freeze_ewc":
        memory = penalty_memory(network, shift=0.05)
        make, weak, strong = FreezeEwc, Ewc("multi", 0.0), Ewc("multi", 5.0)
    else:
        memory = teacher_memory(make_lesson(network, sequence, 0))
        make, weak, strong = FreezeLwf, Lwf("multi", 0.0), Lwf("multi", 5.0)
    before, trained = list(frozen_rows(network, masks)), {}
    for name, strategy in {
        "plain": freeze,
        "weak": make("multi", freeze, weak),
        "strong": make("multi", freeze, strong),
    }.items():
        trained[name] = copy.deepcopy(network)
        learn(strategy, trained[name], sequence, config, memory)
        after = frozen_rows(trained[name], masks)
        for (tensor, frozen, live), (_, still, moved) in zip(before, after, strict=True):
            assert torch.equal(frozen, still), tensor
            assert not torch.equal(live, moved), tensor
    assert same_bits(trained["plain"].state_dict(), trained["weak"].state_dict())
    assert not same_bits(trained["plain"].state_dict(), trained["strong"].state_dict())


def test_a_strong_penalty_holds_the_live_filters(make_stirred, make_sequence, half_masks):
    network, sequence = make_stirred(heads=0.3, batch_norm=False), make_sequence()
    config = TrainingConfig(epochs=20, lr=0.001, batch_size=8, padding=0)
    memory, before = penalty_memory(network, precision=1.0), copied_state(network)
    freeze, names = Freeze("multi", half_masks), list(common_parameters(network, "multi", 1))
    bound = 2 * (1 + config.momentum) / config.lr

    def move(strength):
        trained = copy.deepcopy(network)
        strategy = FreezeEwc("multi", freeze, Ewc("multi", strength))
        learn(strategy, trained, sequence, config, memory)
        return distance(before, trained.state_dict(), names)

    assert move(bound / 2) < 0.1 * move(0.0)


@pytest.mark.parametrize("head", HEADS)
def test_the_penalty_sees_the_whole_weights_of_a_partly_frozen_network(
    make_stirred, make_sequence, half_masks, head
):
    """Frozen rows that are off their centre add to it too, but nothing pulls them."""
    network, sequence = make_stirred(), make_sequence()
    memory, batch = penalty_memory(network, shift=0.1), one_batch(sequence, 1)
    lesson = make_lesson(network, sequence, 1, head, memory=memory)
    plain, _, _ = penalised(lesson, 1.5)(lesson.view(1), batch)
    strategy = FreezeEwc(head, Freeze(head, half_masks), Ewc(head, 3.0))
    with strategy.while_learning(lesson, Phase(1, 1)) as guard:
        lesson.view(1).eval()
        loss, _, _ = guard.objective(lesson.view(1), batch)
        assert type(network.features[0]) is not nn.Conv2d
        weights = current_weights(network)
        assert set(weights) == {name for name, _ in plain_names(network)}
        pulled = loss - cross_entropy(lesson.view(1), batch)[0]
        gradient = torch.autograd.grad(
            pulled, list(network.heads[0].parameters()), allow_unused=True
        )
    torch.testing.assert_close(loss, plain)
    for name, found in zip(("weight", "bias"), gradient, strict=True):
        if head == "multi":
            assert found is None
        else:
            off = network.heads[0].get_parameter(name) - memory[f"{CENTRE}heads.0.{name}"]
            expected = 3 * memory[f"{PRECISION}heads.0.{name}"] * off
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def plain_names(network):
    """Return the names that the network has outside of any block."""
    for name, value in network.named_parameters():
        yield name.replace("weight_rows.live", "weight").replace("bias_rows.live", "bias"), value
