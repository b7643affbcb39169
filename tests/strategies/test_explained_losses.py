"""Losses made of explanations: LwM, RRR and AFC, against plain computations."""

import copy
from dataclasses import replace

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn
from torch.nn import functional as F

from lessons import HEADS, RANKING, SGD, all_images, learn, make_lesson, one_batch, random
from permafrost.explain import activations as explain_activations
from permafrost.explain import fullgrad, input_x_gradient
from permafrost.explain.activations import block_ends, deepest_of_size
from permafrost.models import build_network
from permafrost.ranking.features import feature_layers
from permafrost.strategies import Afc, AfcRanked, Keep, Lwf, Lwm, Phase, Replay, Rrr, afc, lwm, rrr
from permafrost.strategies.lwm import Maps
from permafrost.strategies.old_heads import old_logits
from permafrost.strategies.old_network import old_network_memory
from permafrost.strategies.rrr import explained_buffer_memory

CLOSE = {"rtol": 1e-8, "atol": 1e-11}
# Each method with its strength at 1 and at 0, and the field of its strength.
METHODS = {
    "lwm": (Lwm, {"weight": 0.7}, "attention"),
    "lwm by input": (Lwm, {"weight": 0.7, "maps": "input_x_gradient"}, "attention"),
    "lwm by fullgrad": (Lwm, {"weight": 0.7, "maps": "fullgrad"}, "attention"),
    "afc": (Afc, {"weight": 0.7}, "consolidation"),
    "rrr": (Rrr, {}, "reasons"),
}


@pytest.fixture
def make_lesson_of(make_stirred, make_sequence):
    """Return a builder of lessons of a third task, in float64; weights have moved since."""

    def build(made, head="multi"):
        network, sequence = make_stirred(tasks=3, width=0.1), make_sequence(tasks=3)
        lesson = make_lesson(network, sequence, 1, head, keep=Keep(buffer_images=5))
        memory = made.knowledge(replace(lesson, learned=0)) if made is Rrr else {}
        memory |= made.knowledge(lesson)
        draw = random(5)
        with torch.no_grad():
            for value in network.double().parameters():
                noise = torch.randn(value.shape, generator=draw, dtype=value.dtype)
                value += 0.05 * value.abs().mean() * noise
        return replace(lesson, learned=2, memory=memory)

    return build


def batch_of(lesson, guard):
    batch = one_batch(lesson.sequence, 2)
    offset = lesson.network.label_offset(lesson.head, 2)
    batch = replace(batch, images=batch.images.double(), labels=batch.labels + offset)
    drawn = guard.draw(batch) if guard.draw else ()
    as_double = (t.double() if t.is_floating_point() else t for t in drawn)
    return replace(batch, drawn=tuple(as_double))


def make(name, head="multi", strength=1.0):
    made, options, field = METHODS[name]
    return made(head, **options, **{field: strength})


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_finite_differences(make_lesson_of, name, head):
    """In every direction that was tried, of all weights at once; maps are taken in eval mode.

    The steps are small: a gradient with respect to the image jumps where a ReLU changes its side.
    """
    strategy = make(name, head, strength=3.0)
    if name != "rrr":
        strategy = replace(strategy, weight=0.0)  # LwF's recorded answers are float32
    lesson = make_lesson_of(type(strategy), head)
    view = lesson.view(2).eval()
    with strategy.while_learning(lesson, Phase(2, 1)) as guard:
        batch = batch_of(lesson, guard)
        parameters = [
            value
            for key, value in lesson.network.named_parameters()
            # An old task's own head does not move.
            if head != "multi" or not key.startswith(("heads.0", "heads.1"))
        ]

        def loss():
            return guard.objective(view, batch)[0]

        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        draw = random(9)
        for _ in range(3):
            step = [torch.randn(p.shape, generator=draw, dtype=p.dtype) * 1e-9 for p in parameters]
            slopes = [(g * s).sum() for g, s in zip(gradients, step, strict=True) if g is not None]
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    for parameter, part in zip(parameters, step, strict=True):
                        parameter += sign * part
                ends.append(loss().item())
                with torch.no_grad():
                    for parameter, part in zip(parameters, step, strict=True):
                        parameter -= sign * part
            expected = (ends[0] - ends[1]) / 2
            assert sum(slopes).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_strength_moves_weights(make_network, make_sequence, monkeypatch, name):
    """Through the maps' graph: without it no strength does."""

    def train(strength):
        network, sequence = make_network(tasks=2, width=0.1), make_sequence(train=6)
        lesson = make_lesson(network, sequence, 0, keep=Keep(buffer_images=5))
        strategy = make(name, strength=strength)
        with torch.no_grad():  # the network that learns is no longer the one that was explained
            memory = type(strategy).knowledge(lesson)
            for value in network.features.parameters():
                value += 0.3 * torch.randn(value.shape, generator=random(1)) * value.abs().mean()
        learn(strategy, network, sequence, SGD, memory, keep=Keep(buffer_images=5))
        return network.features.state_dict()

    plain, strong = train(0.0), train(10.0)
    first = "0.weight"
    assert not torch.equal(plain[first], strong[first])
    if name == "afc":
        monkeypatch.setattr(afc, "map_distance", lambda *maps: torch.zeros(()))
    else:
        real = Maps.of
        monkeypatch.setattr(Maps, "of", lambda *given: real(*given).detach())
    assert torch.equal(plain[first], train(10.0)[first])


@pytest.mark.parametrize(("name", "plain"), [("lwm", Lwf), ("afc", Lwf), ("rrr", Replay)])
def test_without_strength_it_is_what_it_builds_on(make_lesson_of, name, plain):
    strategy = make(name, strength=0.0)
    lesson = make_lesson_of(type(strategy))
    view = lesson.view(2).eval()
    losses = []
    for each in (strategy, plain("multi", **METHODS[name][1])):
        with each.while_learning(lesson, Phase(2, 1)) as guard:
            losses.append(guard.objective(view, batch_of(lesson, guard))[0])
    assert losses[0] == losses[1]


def naive_grad_cam(network, lesson, layer, image, chosen):
    """Explain one image by Captum, behind the ReLU that follows the layer's norm."""
    view = network.view("shared", 0, 1)
    place = [name for name, _ in view.features.named_children()].index(layer.split(".")[1])
    relu = next(m for m in list(view.features)[place:] if isinstance(m, nn.ReLU))

    for module in view.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    found = LayerGradCam(OldHeads(network, lesson).eval(), relu).attribute(
        image[None], target=chosen, relu_attributions=True
    )
    return found[0, 0].detach()


def losses_beside_lwf(strategy, lesson):
    """Return a batch's loss by LwM and by LwF, and the batch."""
    with strategy.while_learning(lesson, Phase(2, 1)) as guard:
        batch = batch_of(lesson, guard)
        view = lesson.view(2).eval()
        loss = guard.objective(view, batch)[0]
        with Lwf(lesson.head, weight=0.7).while_learning(lesson, Phase(2, 1)) as plain:
            expected = plain.objective(view, batch)[0]
    return loss, expected, batch


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("how", "explain"), [("input", input_x_gradient), ("fullgrad", fullgrad)])
def test_lwm_compares_other_methods_maps(make_lesson_of, head, how, explain):
    strategy = make(f"lwm by {how}", head, strength=2.0)
    lesson = make_lesson_of(Lwm, head)
    old = lwm.old_network(lesson)
    loss, expected, batch = losses_beside_lwf(strategy, lesson)
    before, after = OldHeads(old, lesson), OldHeads(lesson.network, lesson)
    answered = before(batch.images).argmax(1)
    units = [F.normalize(explain(m, batch.images, answered).flatten(1)) for m in (after, before)]
    distance = (units[0] - units[1]).abs().sum(1).mean()
    assert distance > 0
    torch.testing.assert_close(loss, expected + 2.0 * distance, **CLOSE)


class OldHeads(nn.Module):
    """A network that answers for the old classes."""

    def __init__(self, network, lesson):
        super().__init__()
        self.network, self.lesson = network, lesson
        self.body = network.view("shared", 0, 1)[:-1]

    def forward(self, images):
        head, learned = self.lesson.head, self.lesson.learned
        return torch.cat(old_logits(self.network, head, learned, self.body(images)), dim=1)


def test_maps_without_weights_of_channels_have_no_twin_by_chance():
    for maps, twins in (("gradcam", ("chance",)), ("fullgrad", ()), ("input_x_gradient", ())):
        assert Lwm.controls(Lwm.defaults() | {"maps": maps}) == twins


@pytest.mark.parametrize("head", HEADS)
def test_lwm_compares_captums_maps_of_the_class_that_the_old_network_answers(make_lesson_of, head):
    strategy = make("lwm", head, strength=2.0)
    lesson = make_lesson_of(Lwm, head)
    old = lwm.old_network(lesson)
    layer = deepest_of_size(lesson.network.view("shared", 0, 1), one_image(lesson), 7)
    loss, expected, batch = losses_beside_lwf(strategy, lesson)
    distances = []
    for image in batch.images:
        embedding = old.view("shared", 0, 1)[:-1](image[None])
        logits = torch.cat(old_logits(old, head, 2, embedding), dim=1)
        maps = [
            naive_grad_cam(network, lesson, layer, image, int(logits.argmax()))
            for network in (lesson.network, old)
        ]
        units = [m / m.norm() if m.norm() > 0 else m for m in maps]
        distances.append((units[0] - units[1]).abs().sum())
    assert min(distances) > 0
    torch.testing.assert_close(loss, expected + 2.0 * torch.stack(distances).mean(), **CLOSE)


def one_image(lesson):
    dtype = next(lesson.network.parameters()).dtype
    return all_images(lesson.sequence.tasks[0].train, lesson.sequence)[:1].to(dtype)


def test_maps_of_zeros_stay_zeros():
    zeros, ones = torch.zeros(2, 3, 3, requires_grad=True), torch.ones(2, 3, 3)
    distance = lwm.map_distance(zeros, ones)
    assert distance.item() == pytest.approx(9 / 3)
    (gradient,) = torch.autograd.grad(distance, zeros)
    assert gradient.isfinite().all()
    assert lwm.map_distance(zeros, zeros) == 0


def test_afc_by_hand():
    draw = random(2)
    new, old = (torch.randn(2, 3, 4, 5, generator=draw).double() for _ in range(2))
    weights = torch.tensor([0.5, 2.0, 0.0]).double()
    total = 0.0
    for image in range(2):
        for channel in range(3):
            pair = [z[image, channel].flatten() ** 2 for z in (new, old)]
            units = [p / p.norm() for p in pair]
            total += weights[channel] * (units[0] - units[1]).norm()
    found = afc.map_distance(
        {"a": new, "b": new}, {"a": old, "b": new}, {"a": weights, "b": weights}
    )
    torch.testing.assert_close(found, total / 6 / 2, **CLOSE)  # the second layer has not moved


def test_afcs_distance_has_a_gradient_where_nothing_has_moved():
    maps = torch.rand(1, 2, 3, 3, requires_grad=True)
    dead = torch.zeros(1, 2, 3, 3, requires_grad=True)
    ones = torch.ones(2)
    for new in (maps, dead):
        distance = afc.map_distance({"a": new}, {"a": new.detach()}, {"a": ones})
        (gradient,) = torch.autograd.grad(distance, new)
        assert not gradient.any()


@pytest.mark.parametrize("head", HEADS)
def test_afcs_importance_is_of_each_image_alone(make_stirred, make_sequence, head):
    network, sequence = make_stirred(tasks=3, width=0.1), make_sequence(tasks=3)
    lesson = make_lesson(network, sequence, 1, head)
    found = afc.importance(lesson)
    view = lesson.view(1)
    ends = block_ends(view, one_image(lesson))
    assert list(found) == ends
    sums = dict.fromkeys(ends, 0.0)
    train = sequence.tasks[1].train
    for image, label in zip(all_images(train, sequence), train.labels, strict=True):
        kept, x = {}, image[None]
        layers = list(view.features.named_children())
        for place, (_, layer) in enumerate(layers):
            x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            if isinstance(layer, nn.ReLU):
                kept[f"features.{layers[place - 2][0]}"] = x
        target = label + network.label_offset(head, 1)
        loss = F.cross_entropy(view.head(x.mean((2, 3))), target[None])
        gradients = torch.autograd.grad(loss, [kept[name] for name in ends])
        for name, gradient in zip(ends, gradients, strict=True):
            sums[name] = sums[name] + gradient[0].square().sum((1, 2))
    for name, total in sums.items():
        torch.testing.assert_close(found[name], total / total.mean(), rtol=1e-4, atol=1e-6)
        assert found[name].mean() == pytest.approx(1, rel=1e-5)


def test_afcs_strength_grows_with_the_classes_seen(make_lesson_of):
    lesson = make_lesson_of(Afc)
    view, losses = lesson.view(2).eval(), []
    for strength in (0.0, 1.0, 2.0):
        with make("afc", strength=strength).while_learning(lesson, Phase(2, 1)) as guard:
            losses.append(guard.objective(view, batch_of(lesson, guard))[0])
    torch.testing.assert_close(losses[2] - losses[0], 2 * (losses[1] - losses[0]), **CLOSE)
    layers = afc.part_of(lesson.memory, afc.IMPORTANCE)
    old = afc.old_network(lesson).view("shared", 0, 1)
    features = feature_layers(old, one_image(lesson))
    modules = {name: features[name] for name in layers}
    images, maps = batch_of(lesson, guard).images, []
    for model in (view, old):
        with torch.no_grad(), explain_activations.activations(model, modules) as found:
            model(images)
        maps.append(dict(found))
    expected = (6 / 2) ** 0.5 * afc.map_distance(*maps, layers)
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
def test_rrr_compares_the_stored_maps_of_true_classes(make_lesson_of, head):
    strategy = make("rrr", head, strength=2.0)
    lesson = make_lesson_of(Rrr, head)
    layer = deepest_of_size(lesson.network.view("shared", 0, 1), one_image(lesson), 7)
    assert lesson.memory["0/maps"].shape == (5, 8, 8)
    with strategy.while_learning(lesson, Phase(2, 1)) as guard:
        batch = batch_of(lesson, guard)
        view = lesson.view(2).eval()
        loss = guard.objective(view, batch)[0]
        with Replay(head).while_learning(lesson, Phase(2, 1)) as plain:
            expected = plain.objective(view, replace(batch, drawn=batch.drawn[:6]))[0]
    distances = []
    for task in (0, 1):
        labels, positions = batch.drawn[3 * task + 1], batch.drawn[3 * task + 2]
        clean = lesson.memory[f"{task}/images"]
        each = []
        for label, position in zip(labels, positions, strict=True):
            image = all_images(replace_images(lesson, clean), lesson.sequence)[position].double()
            chosen = int(label) + (0 if head == "shared" else 2 * task)
            now = naive_grad_cam(lesson.network, lesson, layer, image, chosen)
            each.append((now - lesson.memory[f"{task}/maps"][position]).abs().mean())
        distances.append(torch.stack(each).mean())
    torch.testing.assert_close(
        loss, expected + 2.0 * torch.stack(distances).mean(), rtol=1e-5, atol=1e-6
    )


def replace_images(lesson, images):
    return replace(lesson.sequence.tasks[0].train, images=images, labels=torch.zeros(len(images)))


def test_what_is_kept_counts_as_memory(make_lesson_of):
    for name, (made, options, _) in METHODS.items():
        lesson = make_lesson_of(made)
        kept = made("multi", **options).memory_bytes(lesson.sequence, lesson.memory)
        body = sum(v.nbytes for v in lesson.network.float().state_dict().values())
        maps = sum(lesson.memory[f"{task}/maps"].nbytes for task in (0, 1)) if name == "rrr" else 0
        assert kept >= (maps or body)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
@pytest.mark.parametrize("name", METHODS)
def test_networks_that_write_in_place_learn(make_sequence, arch, name):
    width = 1 if arch == "efficientnet_b0" else 0.25
    network = build_network(arch, classes=[2, 2], seed=0, width=width, image_size=(32, 32))
    sequence, strategy = make_sequence(), make(name)
    memory = type(strategy).knowledge(make_lesson(network, sequence, 0, keep=Keep(buffer_images=3)))
    progress = learn(strategy, network, sequence, replace(SGD, epochs=1), memory)
    assert len(progress.history) == 1


def test_maps_do_not_depend_on_what_training_computes_in(make_lesson_of):
    """Stored and new maps of a network that has not moved are equal, also in bfloat16."""
    lesson = make_lesson_of(Rrr)
    lesson.network.float()
    memory = rrr.explained_buffer_memory(replace(lesson, learned=0))
    maps = rrr.grad_cam(lesson, by_chance=False)
    (kept,) = rrr.buffers(lesson, memory, [0])
    images, labels = next(kept.ordered(64))
    with torch.autocast("cpu", torch.bfloat16):
        now = rrr.true_class_maps(lesson, maps, 0, images, labels)
    assert now.any()
    assert torch.equal(now, memory["0/maps"])


def test_twins_by_chance_give_channels_others_weights(make_network, make_sequence):
    """The same map in both networks of lwm: the distance is still 0 where nothing has moved."""
    network, sequence = make_network(), make_sequence()
    memory = old_network_memory(make_lesson(network, sequence, 0))
    batch, found = one_batch(sequence, 1), {}
    for twin in (None, *Lwm.twins):
        strategy = Lwm("multi", 0.0, 2.0, 1.0, twin=twin)
        stirred = copy.deepcopy(network).eval()
        for moved in (False, True):
            if moved:
                with torch.no_grad():
                    stirred.features[4].weight.mul_(-0.5)
            lesson = make_lesson(stirred, sequence, 1, memory=memory)
            with strategy.while_learning(lesson, Phase(1, 1)) as guard:
                loss, logits, labels = guard.objective(lesson.view(1), batch)
            found[twin, moved] = float(loss - F.cross_entropy(logits, labels))
    assert found[None, False] == pytest.approx(0, abs=1e-6)
    assert found["chance", False] == pytest.approx(0, abs=1e-6)
    assert found[None, True] != pytest.approx(found["chance", True], rel=1e-3)


@pytest.mark.parametrize("twin", Rrr.twins)
def test_twins_of_rrr_keep_their_own(make_network, make_sequence, keep, twin):
    network, sequence = make_network(tasks=3), make_sequence(tasks=3, train=40)
    keep = replace(keep, buffer_images=24)
    first = explained_buffer_memory(make_lesson(network, sequence, 0, keep=keep))
    plain = learn(Rrr("multi", 1.0), copy.deepcopy(network), sequence, memory=first, keep=keep)
    other = learn(
        Rrr("multi", 1.0, twin=twin), copy.deepcopy(network), sequence, memory=first, keep=keep
    )
    mine, its = plain.memory, other.memory
    for task in (0, 1):
        if twin == "chance":
            assert torch.equal(mine[f"{task}/images"], its[f"{task}/images"])
            assert mine[f"{task}/maps"].shape == its[f"{task}/maps"].shape
            assert not torch.equal(mine[f"{task}/maps"], its[f"{task}/maps"])
        else:
            assert f"{task}/maps" not in its
            more = len(its[f"{task}/images"]) - len(mine[f"{task}/images"])
            assert more == mine["0/maps"].nbytes // (3 * 32 * 32)
            assert more > 0


def test_filters_that_rank_first_weigh_most(make_network, make_sequence):
    lesson = make_lesson(make_network(), make_sequence(), 1)
    orders = RANKING.orders(lesson)
    for name, weights in AfcRanked("multi", ranking=RANKING)._importance(lesson).items():
        assert weights.argsort(descending=True).tolist() == orders[name].tolist()
        assert float(weights.mean()) == pytest.approx(1)


def test_twins_of_afc_weigh_by_chance_or_equally(make_network, make_sequence):
    lesson = make_lesson(make_network(), make_sequence(), 1)
    importance = torch.rand(16)
    plain, chance, equal = (
        Afc("multi", twin=twin)._weighted(importance, lesson, "a") for twin in (None, *Afc.twins)
    )
    assert torch.equal(plain, importance)
    assert not torch.equal(chance, importance)
    assert torch.equal(chance.sort().values, importance.sort().values)
    assert torch.allclose(equal, importance.mean().expand(16))
