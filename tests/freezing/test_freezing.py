"""Freezing: frozen filters keep their bits, live ones train as if nothing were frozen."""

import copy
import doctest

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import permafrost.freezing
from permafrost.freezing import BATCH_NORM_FREEZES, batch_norm_after, frozen_filters
from permafrost.strategies import Finetune, Freeze, Learner, Progress
from permafrost.training import TrainingConfig

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def convolutions(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


def half_masks(model):
    """Freeze every other filter of each layer."""
    return {name: torch.arange(c.out_channels) % 2 == 0 for name, c in convolutions(model).items()}


def full_masks(model, value):
    return {name: torch.full((c.out_channels,), value) for name, c in convolutions(model).items()}


def make_batches(count=4, size=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 32, 32, generator=generator, dtype=dtype),
            torch.randint(2, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def take_steps(model, optimizer, batches, clip=None):
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def trained_view(network):
    """Train a little, so that no value is still its initial one."""
    view = network.view("shared", 0, 1)
    take_steps(view, OPTIMIZERS["sgd"](view.parameters()), make_batches(2, seed=9))
    for name, value in view.state_dict().items():
        if name.endswith("bias"):
            value.add_(0.1)
    view.zero_grad()
    return view


def rows(state, conv, norm=None):
    """Name the tensors that belong to a convolution's filters."""
    found = {f"{conv}.{part}": state[f"{conv}.{part}"] for part in ("weight", "bias")}
    if norm:
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{part}"] = state[f"{norm}.{part}"]
    return found


def frozen_and_live(before, after, masks, norms):
    """Yield each tensor's name with its rows: frozen before and after, live before and after."""
    for conv, mask in masks.items():
        old, new = rows(before, conv, norms.get(conv)), rows(after, conv, norms.get(conv))
        for name in old:
            yield name, old[name][mask], new[name][mask], old[name][~mask], new[name][~mask]


@pytest.mark.parametrize(("clip", "evaluating"), [(None, False), (0.5, True)])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_frozen_filters_keep_their_bits_and_live_ones_move(
    make_network, optimizer, batch_norm, clip, evaluating
):
    view = trained_view(make_network(batch_norm=batch_norm))
    before = copy.deepcopy(view.state_dict())
    masks, norms = half_masks(view), batch_norm_after(view)
    assert len(norms) == (8 if batch_norm else 0)
    with frozen_filters(view, masks):
        take_steps(view, OPTIMIZERS[optimizer](view.parameters()), make_batches(), clip)
        view.train(not evaluating)
    moved = 0
    for name, frozen_old, frozen_new, old, new in frozen_and_live(
        before, view.state_dict(), masks, norms
    ):
        assert torch.equal(frozen_old, frozen_new), name
        changed = (old != new).flatten(1).any(1) if old.ndim > 1 else old != new
        assert changed.all(), name
        moved += 1
    assert moved == 8 * (6 if batch_norm else 2)
    assert not torch.equal(before["head.weight"], view.state_dict()["head.weight"])


def test_a_stale_optimizer_cannot_move_frozen_filters(make_network):
    """An optimizer of the plain layers, full of momentum, steps on inside the block."""
    view = trained_view(make_network())
    stale = OPTIMIZERS["adam"](view.parameters())
    take_steps(view, stale, make_batches(2))
    before = copy.deepcopy(view.state_dict())
    masks = half_masks(view)
    with frozen_filters(view, masks):
        fresh = OPTIMIZERS["sgd"](view.parameters())
        for batch in make_batches(3):
            take_steps(view, fresh, [batch])
            stale.step()
    for name, old, new, *_ in frozen_and_live(
        before, view.state_dict(), masks, batch_norm_after(view)
    ):
        assert torch.equal(old, new), name


@pytest.mark.parametrize("mode", ["affine", "none"])
def test_clipping_sees_the_live_rows_only(make_network, mode):
    view = trained_view(make_network()).double().train()
    (batch,) = make_batches(1, dtype=torch.float64)
    masks, norms = half_masks(view), batch_norm_after(view)
    plain = copy.deepcopy(view)
    F.cross_entropy(plain(batch[0]), batch[1]).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for conv, mask in masks.items():
        for layer in (conv, norms[conv]) if mode == "affine" else (conv,):
            for part in ("weight", "bias"):
                gradients[f"{layer}.{part}"] = gradients[f"{layer}.{part}"][~mask]
    expected = torch.cat([g.flatten() for g in gradients.values()]).norm()
    with frozen_filters(view, masks, mode):
        F.cross_entropy(view(batch[0]), batch[1]).backward()
        norm = torch.nn.utils.clip_grad_norm_(view.parameters(), expected.item() / 3)
        torch.testing.assert_close(norm, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(
            view.get_submodule("features.0").weight_rows.live.grad,
            gradients["features.0.weight"] / 3,
            rtol=1e-5,
            atol=1e-12,
        )


@pytest.fixture
def block():
    """Return a convolution and a BatchNorm with statistics of its own, and half a mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).double()
    norm = model[1]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return model, torch.tensor([True, False, False, True, True, False])


def test_full_normalises_frozen_channels_by_their_frozen_statistics(block):
    model, frozen = block
    model.float()
    images = torch.randn(5, 3, 8, 8)
    other = torch.cat([images[:1], 3 + 2 * torch.randn(4, 3, 8, 8)])
    expected = copy.deepcopy(model).eval()(images)
    with frozen_filters(model, {"0": frozen}, "full"):
        model.train()
        output, again = model(images), model(other)
    torch.testing.assert_close(output[:, frozen], expected[:, frozen], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again[0, frozen], output[0, frozen], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(again[0, ~frozen], output[0, ~frozen], atol=1e-2)


def test_full_passes_gradients_through_frozen_channels_by_their_scale(block):
    model, frozen = block
    norm = model[1]
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    inputs = torch.randn(4, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    with frozen_filters(model, {"0": frozen}, "full"):
        model.train()
        (model[1](inputs) * weights).sum().backward()
    expected = weights * scale[:, None, None]
    torch.testing.assert_close(inputs.grad[:, frozen], expected[:, frozen], rtol=1e-12, atol=1e-12)


def test_affine_keeps_gamma_and_beta_and_lets_statistics_move(block):
    model, frozen = block
    before = copy.deepcopy(model.state_dict())
    plain = copy.deepcopy(model).train()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with frozen_filters(model, {"0": frozen}, "affine"):
        model.train()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        output = model(images)
        output.square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(output, plain(images), rtol=1e-12, atol=1e-12)
    after = model.state_dict()
    for part in ("weight", "bias"):
        assert torch.equal(before[f"1.{part}"][frozen], after[f"1.{part}"][frozen])
        assert (before[f"1.{part}"] != after[f"1.{part}"])[~frozen].all()
    for part in ("running_mean", "running_var"):
        assert (before[f"1.{part}"] != after[f"1.{part}"]).all()
        torch.testing.assert_close(after[f"1.{part}"], plain.state_dict()[f"1.{part}"])


def test_none_leaves_the_batch_norm_alone(block):
    model, frozen = block
    before, norm = copy.deepcopy(model.state_dict()), model[1]
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with frozen_filters(model, {"0": frozen}, "none"):
        assert model[1] is norm
        model.train()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        model(images).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    assert torch.equal(before["0.weight"][frozen], after["0.weight"][frozen])
    assert (before["1.weight"] != after["1.weight"]).all()
    assert (before["1.running_mean"] != after["1.running_mean"]).all()


@pytest.mark.parametrize("mode", ["full", "affine"])
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_live_channels_are_a_plain_batch_norms(block, momentum, mode):
    model, frozen = block
    live = ~frozen
    model[1].momentum = momentum
    plain = copy.deepcopy(model).train()
    model.train()

    def close(left, right):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)

    with frozen_filters(model, {"0": frozen}, mode):
        for step in range(3):
            images = step + torch.randn(4, 3, 8, 8, dtype=torch.float64)
            ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
            weights = torch.randn(4, 3, 6, 6, dtype=torch.float64)
            output, expected = model(ours)[:, live], plain(theirs)[:, live]
            close(output, expected)
            for module in (model, plain):
                module.zero_grad()
            (output.square() * weights).sum().backward()
            (expected.square() * weights).sum().backward()
            close(ours.grad, theirs.grad)
            close(model[0].weight_rows.live.grad, plain[0].weight.grad[live])
            close(model[0].bias_rows.live.grad, plain[0].bias.grad[live])
            close(model[1].weight_rows.live.grad, plain[1].weight.grad[live])
            close(model[1].bias_rows.live.grad, plain[1].bias.grad[live])
            close(model[1].running_mean[live], plain[1].running_mean[live])
            close(model[1].running_var[live], plain[1].running_var[live])
        model.eval()
        inside = model(images)
    assert torch.equal(model[1].num_batches_tracked, plain[1].num_batches_tracked)
    close(model[1].running_var[live], plain[1].running_var[live])
    close(inside, model.eval()(images))  # the plain layers answer as the stand-ins did


def test_batch_norm_without_affine_or_statistics():
    mask = torch.tensor([True, False])
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, affine=False))
    images = 2 + torch.randn(4, 3, 4, 4)
    with frozen_filters(model, {"0": mask}, "full"):
        model.train()(images)
    assert model[1].running_mean[0] == 0
    assert model[1].running_mean[1] != 0
    model[1] = nn.BatchNorm2d(2, track_running_stats=False)
    with (
        pytest.raises(ValueError, match="without running statistics"),
        frozen_filters(model, {"0": mask}),
    ):
        pass
    assert type(model[0]) is nn.Conv2d


def learn(make_network, sequence, strategy):
    network = make_network()
    config = TrainingConfig(epochs=2, lr=0.05, batch_size=4)
    learner = Learner(sequence, config, head="shared", seed=1, device=torch.device("cpu"))
    progress = Progress(1, [])
    learner.learn_task(network, strategy, progress)
    return network.state_dict(), progress


@pytest.mark.parametrize("mode", BATCH_NORM_FREEZES)
def test_pct_zero_is_fine_tuning_bit_for_bit(make_network, make_sequence, same_bits, mode):
    sequence = make_sequence()
    plain, expected = learn(make_network, sequence, Finetune("shared"))
    none = Freeze(
        "shared", lambda lesson, frozen: full_masks(lesson.network, False), batch_norm=mode
    )
    frozen, progress = learn(make_network, sequence, none)
    assert same_bits(plain, frozen)
    assert progress.history == expected.history
    assert progress.rows == expected.rows


@pytest.fixture
def wholly_frozen(make_network, make_sequence):
    """Return the states before and after a training in which every filter is frozen."""
    before = make_network().state_dict()
    everything = Freeze("shared", lambda lesson, frozen: full_masks(lesson.network, True))
    after, _ = learn(make_network, make_sequence(), everything)
    return before, after


def test_pct_one_leaves_all_features_unchanged(wholly_frozen):
    before, after = wholly_frozen
    for name in before:
        if name.startswith("features.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["heads.0.weight"], after["heads.0.weight"])
    assert not torch.equal(before["heads.0.bias"], after["heads.0.bias"])


def test_pct_one_counts_no_batches(wholly_frozen):
    before, after = wholly_frozen
    counters = [name for name in before if name.endswith("num_batches_tracked")]
    assert len(counters) == 8
    assert all(torch.equal(before[name], after[name]) for name in counters)


@pytest.mark.parametrize("mode", [None, "none", "affine"])
def test_training_equals_restoring_the_frozen_rows_after_every_step(make_network, mode):
    """In float64, against the naive way: a full step, then the frozen rows are put back."""
    view = trained_view(make_network(batch_norm=mode is not None)).double().train()
    masks, norms = half_masks(view), batch_norm_after(view)
    naive, initial = copy.deepcopy(view), copy.deepcopy(view.state_dict())
    batches = make_batches(5, dtype=torch.float64)
    with frozen_filters(view, masks, mode or "full"):
        take_steps(view, OPTIMIZERS["sgd"](view.parameters()), batches)
    optimizer = OPTIMIZERS["sgd"](naive.parameters())
    for batch in batches:
        take_steps(naive, optimizer, [batch])
        state = naive.state_dict()
        for conv, mask in masks.items():
            for layer in (conv, norms[conv]) if mode == "affine" else (conv,):
                for part in ("weight", "bias"):
                    state[f"{layer}.{part}"][mask] = initial[f"{layer}.{part}"][mask]
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(view.state_dict()[name], value, rtol=0, atol=1e-10, msg=name)
    assert not torch.allclose(initial["features.0.weight"], view.state_dict()["features.0.weight"])


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("short", [False, True])
def test_maps_and_gradients_keep_the_networks_memory_format(make_network, short, batch_norm):
    """Channels last, which convolutions are fastest in; one layer of another slows all above it."""
    view = make_network(batch_norm=batch_norm).view("shared", 0, 1).train()
    masks, seen = half_masks(view), []

    def note(tensor):
        last = tensor.is_contiguous(memory_format=torch.channels_last)
        seen.append(last and not tensor.is_contiguous())

    def note_both(_layer, _inputs, output):
        note(output)
        output.register_hook(note)

    ((images, labels),) = make_batches(1)
    with frozen_filters(view, masks):
        for name in masks:
            view.get_submodule(name).register_forward_hook(note_both)
        with torch.autocast("cpu", torch.bfloat16, enabled=short):
            loss = F.cross_entropy(view(images), labels)
        loss.backward()
    assert seen == [True] * 2 * 8


@pytest.mark.parametrize("fails", [False, True])
def test_the_plain_layers_return(make_network, fails):
    view = make_network().view("shared", 0, 1)
    before = dict(view.named_modules())
    parameters = [id(parameter) for parameter in view.parameters()]
    old = copy.deepcopy(view.state_dict())
    try:
        with frozen_filters(view, half_masks(view)) as inside:
            assert inside is view
            assert type(view.get_submodule("features.0")) is not nn.Conv2d
            assert type(view.get_submodule("features.1")) is not nn.BatchNorm2d
            take_steps(view, OPTIMIZERS["sgd"](view.parameters()), make_batches(1))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = dict(view.named_modules())
    assert type(view.features[0]) is nn.Conv2d
    assert type(view.features[1]) is nn.BatchNorm2d
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert [id(parameter) for parameter in view.parameters()] == parameters
    assert not torch.equal(old["features.0.weight"], view.state_dict()["features.0.weight"])


@pytest.mark.parametrize("training", [False, True])
def test_the_training_flag_is_handed_on(block, training):
    model, frozen = block
    model.train(training)
    with frozen_filters(model, {"0": frozen}):
        assert model[0].training == model[1].training == training
        model.train(not training)
    assert model[0].training == model[1].training == (not training)


def test_layers_without_a_frozen_filter_stay_plain(make_network):
    network = make_network()
    masks = half_masks(network)
    first = network.features[0]
    masks["features.0"][:] = False
    del masks["features.4"]
    with frozen_filters(network, masks):
        assert network.features[0] is first
        assert type(network.features[1]) is nn.BatchNorm2d
        assert type(network.features[4]) is nn.Conv2d
        assert type(network.features[8]) is not nn.Conv2d


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"1": torch.ones(6, dtype=torch.bool)}, "'1' is no Conv2d"),
        ({"0": torch.ones(5, dtype=torch.bool)}, r"mask of '0' must be bool of shape \(6,\)"),
        ({"0": torch.ones(6)}, r"mask of '0' must be bool of shape \(6,\)"),
        ({"0": torch.ones(6, 1, dtype=torch.bool)}, r"shape \(6,\)"),
    ],
)
def test_wrong_masks(block, masks, message):
    model, frozen = block
    with pytest.raises(ValueError, match=message), frozen_filters(model, {"0": frozen} | masks):
        pass
    assert type(model[0]) is nn.Conv2d


def test_a_name_that_is_no_layer(block):
    model, frozen = block
    with pytest.raises(ValueError, match="nowhere"), frozen_filters(model, {"nowhere": frozen}):
        pass


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_with_a_single_filter(make_network, frozen):
    view = trained_view(make_network(width=0.01))
    assert view.features[0].out_channels == 1
    before = copy.deepcopy(view.state_dict())
    with frozen_filters(view, {"features.0": torch.tensor([frozen])}):
        take_steps(view, OPTIMIZERS["adamw"](view.parameters()), make_batches(2))
    after = view.state_dict()
    for name in rows(before, "features.0", "features.1"):
        assert torch.equal(before[name], after[name]) == frozen, name
    assert not torch.equal(before["features.4.weight"], after["features.4.weight"])


def test_resnet18():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=2)
    norms = batch_norm_after(model)
    expected = {"conv1": "bn1"}
    for layer in range(1, 5):
        for part in ("0", "1"):
            for number in ("1", "2"):
                expected[f"layer{layer}.{part}.conv{number}"] = f"layer{layer}.{part}.bn{number}"
        if layer > 1:
            expected[f"layer{layer}.0.downsample.0"] = f"layer{layer}.0.downsample.1"
    assert norms == expected
    masks = half_masks(model)
    before = copy.deepcopy(model.state_dict())
    with frozen_filters(model, masks):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        take_steps(model, optimizer, make_batches(1, size=2))
    after = model.state_dict()
    for conv, mask in masks.items():
        for name in (f"{conv}.weight", f"{norms[conv]}.weight", f"{norms[conv]}.running_mean"):
            assert torch.equal(before[name][mask], after[name][mask]), name
            assert not torch.equal(before[name][~mask], after[name][~mask]), name


def test_a_batch_norm_behind_a_relu_does_not_belong_to_the_convolution():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU()
    )
    assert batch_norm_after(model) == {}


def test_docstring_example():
    result = doctest.testmod(permafrost.freezing)
    assert result.attempted > 0
    assert result.failed == 0


def test_one_value_per_channel_is_refused_as_plain_batch_norm_does():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).train()
    with frozen_filters(model, {"0": torch.tensor([True, False])}):
        with pytest.raises(ValueError, match="more than one value per channel"):
            model(torch.randn(1, 3, 1, 1))
        assert model[1].running_var.isfinite().all()
