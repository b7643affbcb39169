"""Single weights held fixed: no optimizer moves them, and the network comes back as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from permafrost.freezing import current_weights, frozen_filters, frozen_weights, plain_copy

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def take_steps(network, optimizer, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    view = network.view("shared", 0, 1).train()
    for _ in range(count):
        images = torch.randn(6, 3, 32, 32, generator=generator)
        labels = torch.randint(2, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(view(images), labels).backward()
        optimizer.step()


@pytest.fixture
def network(make_network):
    """Return a network that was trained a little, so that no value is still its initial one."""
    network = make_network(width=0.03)
    nn.init.normal_(network.heads[0].weight, generator=torch.Generator().manual_seed(1))
    take_steps(network, OPTIMIZERS["sgd"](network.parameters()), seed=9)
    network.zero_grad()
    return network.eval()


def scattered_masks(network):
    """Mark single elements, without any pattern, of all weights that are shared and some biases."""
    generator = torch.Generator().manual_seed(2)
    biases = ("features.0.bias", "heads.0.bias", "heads.0.weight")
    masks = {
        name: torch.rand(value.shape, generator=generator) < 0.5
        for name, value in network.named_parameters()
        if value.ndim == 4 or name in biases
    }
    for mask in masks.values():  # of each at least one element is held, and one is not
        mask.view(-1)[:2] = torch.tensor([True, False])
    return masks


def structure(network):
    """Describe all that must be as before, but the numbers."""
    return {
        "modules": [(name, type(module)) for name, module in network.named_modules()],
        "parameters": [
            (name, value.shape, value.stride(), value.requires_grad, value.is_leaf)
            for name, value in network.named_parameters()
        ],
        "state": list(network.state_dict()),
    }


@pytest.mark.parametrize("batch_norms", [False, True])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_marked_elements_keep_their_bits_and_the_others_move(network, optimizer, batch_norms):
    before, masks = copy.deepcopy(network.state_dict()), scattered_masks(network)
    with frozen_weights(network, masks, batch_norms=batch_norms):
        take_steps(network, OPTIMIZERS[optimizer](network.parameters()))
    after = network.state_dict()
    for name, mask in masks.items():
        assert torch.equal(before[name][mask], after[name][mask]), name
        # Behind a ReLU that is never on, a weight has no gradient, but it decays.
        assert (before[name] != after[name])[~mask].all(), name
    assert not torch.equal(before["features.0.weight"], after["features.0.weight"])
    assert not torch.equal(before["features.4.bias"], after["features.4.bias"])
    norms = [f"features.{i}" for i, m in enumerate(network.features) if type(m) is nn.BatchNorm2d]
    assert len(norms) == 8
    for norm in norms:
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            name = f"{norm}.{part}"
            assert torch.equal(before[name], after[name]) == batch_norms, name


def test_the_numbers_that_the_network_computes_with_are_held_at_every_step(network):
    masks, before = scattered_masks(network), copy.deepcopy(network.state_dict())
    with frozen_weights(network, masks):
        optimizer = OPTIMIZERS["sgd"](network.parameters())
        for step in range(3):
            take_steps(network, optimizer, 1, seed=step)
            for name, mask in masks.items():
                now = current_weights(network)[name]
                assert torch.equal(now[mask], before[name][mask])
                assert not torch.equal(now[~mask], before[name][~mask])


def test_the_others_train_as_if_the_marked_were_put_back_after_every_step(network):
    """Without momentum the naive way is the same, bit for bit up to the sums' order."""
    masks, initial = scattered_masks(network), copy.deepcopy(network.state_dict())
    naive = copy.deepcopy(network)
    plain = naive.view("shared", 0, 1)
    with frozen_weights(network, masks):
        take_steps(network, torch.optim.SGD(network.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        images = torch.randn(6, 3, 32, 32, generator=generator)
        labels = torch.randint(2, (6,), generator=generator)
        plain.train()
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()
        for name, mask in masks.items():
            naive.state_dict()[name][mask] = initial[name][mask]
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_the_plain_network_returns(network, fails):
    before = structure(network)
    view = network.view("shared", 0, 1)
    assert any(stride[-1] != 1 for *_, stride, _, _ in before["parameters"])  # channels last
    try:
        with frozen_weights(network, scattered_masks(network), batch_norms=True) as inside:
            assert inside is network
            assert structure(network) != before
            take_steps(network, OPTIMIZERS["adam"](network.parameters()), 1)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert structure(network) == before  # in order, by which an optimizer knows its parameters
    old = copy.deepcopy(network.state_dict())
    take_steps(network, torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1), 1)
    for name, value in view.state_dict().items():  # it trains on, as if nothing had been
        assert not torch.equal(value, old[name.replace("head.", "heads.0.")]), name


@pytest.mark.parametrize("training", [False, True])
def test_the_training_flag_is_handed_on(network, training):
    network.train(training)
    with frozen_weights(network, scattered_masks(network), batch_norms=True):
        assert all(module.training == training for module in network.features)
        network.train(not training)
    assert all(module.training != training for module in network.features)


def test_a_frozen_batch_norm_normalises_by_its_statistics_in_training(network):
    images = torch.randn(6, 3, 32, 32)
    view = network.view("shared", 0, 1)
    expected = view.eval()(images)
    with frozen_weights(network, {}, batch_norms=True):
        torch.testing.assert_close(view.train()(images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(view.train()(images), expected, rtol=1e-2, atol=1e-2)


def held(network, *names):
    return {n: torch.ones_like(network.get_parameter(n), dtype=torch.bool) for n in names}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "spoil",
    [torch.Tensor.float, torch.Tensor.flatten, lambda mask: mask[:1], lambda mask: mask[None]],
    ids=["type", "flat", "broadcastable", "dimensions"],
)
def test_a_wrong_mask_is_refused_and_nothing_is_held(network, spoil, place):
    names = ["features.0.weight", "features.4.weight"]
    masks, before = held(network, *names), structure(network)
    masks[names[place]] = spoil(masks[names[place]])
    with pytest.raises(ValueError, match=names[place]), frozen_weights(network, masks):
        pass
    assert structure(network) == before


def test_another_kind_of_layer_is_refused_and_nothing_is_held(network):
    before, masks = structure(network), held(network, "features.0.weight", "features.5.weight")
    with pytest.raises(ValueError, match="BatchNorm2d"), frozen_weights(network, masks):
        pass
    assert structure(network) == before


def test_a_batch_norm_without_statistics_is_refused_and_nothing_is_held(network):
    network.features[5] = nn.BatchNorm2d(4, track_running_stats=False)
    before, masks = structure(network), held(network, "features.0.weight")
    with (
        pytest.raises(ValueError, match="without running statistics"),
        frozen_weights(network, masks, batch_norms=True),
    ):
        pass
    assert structure(network) == before


def test_an_unknown_parameter_is_refused(network):
    before = structure(network)
    masks = held(network, "features.0.weight") | {"nowhere.weight": torch.ones(1).bool()}
    with (
        pytest.raises(ValueError, match="nowhere"),
        frozen_weights(network, masks),
    ):
        pass
    assert structure(network) == before


def row_masks(network):
    masks = {
        f"features.{index}": torch.arange(layer.out_channels) % 2 == 0
        for index, layer in enumerate(network.features)
        if isinstance(layer, nn.Conv2d)
    }
    masks["features.4"][:] = True  # one layer as a whole, and one left out
    del masks["features.8"]
    return masks


@pytest.mark.parametrize("mode", ["full", "none"])
def test_current_weights_are_the_plain_networks(network, mode):
    expected = {name: value.detach().clone() for name, value in network.named_parameters()}
    plain = current_weights(network)
    assert list(plain) == list(expected)
    assert all(plain[name] is value for name, value in network.named_parameters())
    with frozen_filters(network, row_masks(network), mode):
        weights = current_weights(network)
        assert set(weights) == set(expected)
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name
        take_steps(network, OPTIMIZERS["adam"](network.parameters()), 1)
        inside = {name: value.detach().clone() for name, value in current_weights(network).items()}
    for name, value in network.named_parameters():
        assert torch.equal(inside[name], value), name
    assert not torch.equal(inside["features.0.weight"], expected["features.0.weight"])


def test_gradients_of_current_weights_reach_the_live_rows_only(network):
    masks = row_masks(network)
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in network.named_parameters()
    }
    with frozen_filters(network, masks):
        sum((value * factors[n]).sum() for n, value in current_weights(network).items()).backward()
        for name, mask in masks.items():
            norm = f"features.{int(name.split('.')[1]) + 1}"
            for layer in (name, norm):
                for part in ("weight", "bias"):
                    rows = getattr(network.get_submodule(layer), f"{part}_rows")
                    if mask.all():
                        assert rows.live is None
                    else:
                        expected = factors[f"{layer}.{part}"][~mask]
                        assert torch.equal(rows.live.grad, expected), (layer, part)
        # What is not held is a plain parameter.
        assert torch.equal(network.features[8].weight.grad, factors["features.8.weight"])
        assert torch.equal(network.heads[0].weight.grad, factors["heads.0.weight"])
    assert network.features[0].weight.grad is None


def hold_filters(network):
    return frozen_filters(network, row_masks(network))


def hold_weights(network):
    return frozen_weights(network, scattered_masks(network))


def hold_weights_and_norms(network):
    return frozen_weights(network, scattered_masks(network), batch_norms=True)


@pytest.mark.parametrize("hold", [hold_filters, hold_weights, hold_weights_and_norms])
def test_a_plain_copy_is_what_leaving_would_give_and_leaves_the_original_alone(
    network, same_bits, hold
):
    other, before = copy.deepcopy(network), structure(network)
    images = torch.randn(4, 3, 32, 32)

    def train(network, ask_for_copies):
        copies = []
        with hold(network):
            held = structure(network)
            optimizer = OPTIMIZERS["adamw"](network.parameters())
            for step in range(2):
                take_steps(network, optimizer, 1, seed=step)
                if ask_for_copies:
                    copies.append(plain_copy(network))
            assert structure(network) == held
            answers = network.view("shared", 0, 1).eval()(images).detach()
        return copies, answers

    copies, answers = train(network, ask_for_copies=True)
    _, expected = train(other, ask_for_copies=False)
    assert torch.equal(answers, expected)
    assert same_bits(network.state_dict(), other.state_dict())
    first, last = (copied.state_dict() for copied in copies)
    assert structure(copies[1])["modules"] == before["modules"]
    assert set(last) == set(network.state_dict())
    assert all(torch.equal(last[name], value) for name, value in network.state_dict().items())
    assert any(not torch.equal(first[name], last[name]) for name in last)
    torch.testing.assert_close(copies[1].eval().view("shared", 0, 1)(images), answers)
    with torch.no_grad():  # nothing is shared
        for value in copies[1].parameters():
            value.zero_()
    assert same_bits(network.state_dict(), other.state_dict())


def test_a_plain_copy_of_a_plain_network(network, same_bits):
    copied = plain_copy(network)
    assert same_bits(copied.state_dict(), network.state_dict())
    assert structure(copied) == structure(network)
    assert copied.features[0].weight is not network.features[0].weight
