"""Held layers stay the layers that they are: whatever is done with a network goes on working.

By frozen filters or by single weights, which are held in the same way.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from held import (
    ALL,
    FROZEN,
    HOLD,
    build,
    check_frozen,
    element_masks,
    filters,
    images,
    state,
    train,
)
from permafrost.freezing import frozen_filters, frozen_weights, plain_copy
from permafrost.models.units import trace_flow

# The layers stay


@HOLD
def test_the_layers_are_the_same_objects_of_a_subclass(hold):
    model = build()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    with hold(model):
        assert model[0] is modules["0"]
        assert type(model[0]) is not nn.Conv2d
        assert isinstance(model[0], nn.Conv2d)
        assert isinstance(model[1], nn.BatchNorm2d)
        train(model)
    assert dict(model.named_modules()) == modules
    assert type(model[0]) is nn.Conv2d
    assert type(model[1]) is nn.BatchNorm2d
    assert list(model.named_parameters()) == list(parameters.items())
    assert vars(model[0]).keys() == vars(nn.Conv2d(3, 6, 3)).keys()


@HOLD
def test_hooks_are_called_and_those_set_inside_stay(hold):
    model, calls = build(), []
    model[0].register_forward_hook(lambda *_: calls.append("before"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    with hold(model):
        model[3].register_forward_hook(lambda *_: calls.append("inside"))
        model(images()).sum().backward()
    assert calls == ["before", "inside", "backward"]
    model(images())
    assert calls[3:] == ["before", "inside"]


class Twice(nn.Module):
    """A convolution by two names, a norm behind two convolutions, and three behind one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.again = self.second
        self.bn, self.bn2, self.bn3 = (nn.BatchNorm2d(6) for _ in range(3))

    def forward(self, x):
        x = F.relu(self.bn(self.second(self.bn(self.first(x)))))
        x = F.relu(self.bn2(self.second(x)))
        return self.bn3(self.again(x)).square().mean((2, 3))


@pytest.mark.parametrize("name", ["second", "again"])
def test_a_shared_convolution_and_all_norms_behind_it(name):
    model = Twice()
    before, other = state(model), torch.arange(6) == 3
    with frozen_filters(model, {name: FROZEN, "first": other}):
        train(model)
        inside = model.eval()(images())
    after = state(model)
    assert torch.equal(inside, model(images()))
    parts = ("weight", "bias", "running_mean", "running_var")
    names = [f"{norm}.{part}" for norm in ("bn2", "bn3") for part in parts]
    check_frozen(before, after, "second.weight", "again.weight", "second.bias", *names)
    for part in parts:  # a channel is frozen for the sake of either filter
        equal = before[f"bn.{part}"] == after[f"bn.{part}"]
        assert torch.equal(equal, FROZEN | other)


@pytest.mark.parametrize("name", ["second", "again"])
def test_single_weights_of_a_shared_layer(name):
    model = Twice()
    before = state(model)
    mask = FROZEN[:, None, None, None].expand(6, 6, 3, 3)
    with frozen_weights(model, {f"{name}.weight": mask}):
        train(model)
    check_frozen(before, state(model), "second.weight", "again.weight")


def test_one_layer_takes_one_mask():
    model = Twice()
    with (
        pytest.raises(ValueError, match="second name"),
        frozen_filters(model, {"second": FROZEN, "again": FROZEN}),
    ):
        pass
    masks = {f"{n}.weight": torch.ones(6, 6, 3, 3).bool() for n in ("second", "again")}
    with pytest.raises(ValueError, match="second name"), frozen_weights(model, masks):
        pass


# What does not require a gradient


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"])
@HOLD
def test_what_does_not_require_a_gradient_stays(hold, name):
    model = build()
    model.get_parameter(name).requires_grad_(False)
    before = state(model)
    with hold(model):
        train(model)
    after = state(model)
    assert torch.equal(before[name], after[name])
    assert not torch.equal(before["6.weight"], after["6.weight"])
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [name]
    if hold is filters:
        check_frozen(before, after, *[other for other in ALL if other != name])


def test_what_is_asked_of_gradients_inside_is_handed_on():
    model = build()
    with filters(model):
        model[:2].requires_grad_(False)
    held = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert held == ["0.weight", "0.bias", "1.weight", "1.bias"]


# Other types, state dicts and copies


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to(memory_format=torch.channels_last),
    ],
    ids=["double", "bfloat16", "channels_last"],
)
@HOLD
def test_a_network_converted_inside_works_inside_and_afterwards(hold, convert):
    model = build()
    parameters = list(model.parameters())
    model(images()).sum().backward()  # gradients that are left over are converted too
    with hold(model):
        convert(model)
        inputs = images(dtype=model[6].weight.dtype)
        start = state(model)
        train(model, inputs)
        check_frozen(start, state(model), "0.weight", "3.weight")
        inside = model.eval()(inputs)
    assert torch.equal(model(inputs), inside)
    assert all(now is old for now, old in zip(model.parameters(), parameters, strict=True))
    model(inputs).sum().backward()
    train(model, inputs)


@HOLD
def test_a_network_of_a_short_type(hold):
    model = build().bfloat16()
    before = state(model)
    with hold(model):
        train(model, images(dtype=torch.bfloat16))
    check_frozen(before, state(model), "0.weight", "3.weight")


@HOLD
def test_the_state_dict_is_the_plain_networks(hold, same_bits):
    model = build()
    before = state(model)
    with hold(model):
        assert same_bits(model.state_dict(), before)
        first = model.state_dict()
        train(model)
        assert not torch.equal(first["0.weight"], model.state_dict()["0.weight"])
        inside = model.state_dict()
        whole = model.state_dict(keep_vars=True)["0.weight"]
        assert whole.requires_grad
        fresh = build()
        fresh.load_state_dict(inside)
        torch.testing.assert_close(fresh.eval()(images()), model.eval()(images()))
    assert same_bits(model.state_dict(), inside)


@pytest.mark.parametrize("assign", [False, True])
@HOLD
def test_loading_inside_replaces_frozen_rows_too_and_they_stay(hold, assign, same_bits):
    model, other = build(), build()
    train(other)
    loaded = state(other.double() if assign else other)
    with hold(model):
        model.load_state_dict(copy.deepcopy(loaded), assign=assign)
        assert same_bits(model.state_dict(), loaded)
        inputs = images(dtype=model[6].weight.dtype)
        assert torch.equal(model.eval()(inputs), other.eval()(inputs))
        train(model, inputs)
        inside = model.eval()(inputs)
    check_frozen(loaded, state(model), "0.weight", "3.weight")
    assert torch.equal(model(inputs), inside)


@HOLD
def test_loading_inside_is_as_strict_as_outside(hold, same_bits):
    model = build()
    good = state(model)
    with hold(model):
        missing = {name: value for name, value in good.items() if name != "0.weight"}
        more = good | {"0.weight_rows.live": torch.zeros(1)}
        shape = good | {"0.weight": torch.zeros(1)}
        for wrong, message in (
            (missing, r'Missing key.*"0.weight"'),
            (more, r'Unexpected key.*"0.weight_rows.live"'),
            (shape, "size mismatch for 0.weight"),
        ):
            with pytest.raises(RuntimeError, match=message):
                model.load_state_dict(wrong)
        assert model.load_state_dict(missing, strict=False).missing_keys == ["0.weight"]
    assert same_bits(model.state_dict(), good)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["deepcopy", "pickle", "saved"],
)
@HOLD
def test_a_copy_is_held_like_the_network_and_can_be_made_plain(hold, copied, same_bits):
    model = build()
    with hold(model):
        train(model)
        before = state(model)
        other = copied(model)
        train(other)
        assert same_bits(model.state_dict(), before)
        check_frozen(before, state(other), "0.weight", "3.weight")
        plain = plain_copy(other)
    assert same_bits(plain.state_dict(), other.state_dict())
    assert [type(layer) for layer in plain] == [type(layer) for layer in build()]
    assert all(value.is_leaf for value in plain.parameters())
    assert same_bits(model.state_dict(), before)


def test_blocks_within_blocks_hold_each_layer_once():
    model = build()
    before, masks = state(model), element_masks(model)
    with frozen_filters(model, {"3": FROZEN}):
        for hold in (filters(model), frozen_weights(model, masks)):
            with pytest.raises(ValueError, match="'3' is held already"), hold:
                pass
        with frozen_filters(model, {"0": FROZEN}):
            train(model)
            check_frozen(before, state(model), *ALL)
        train(model)
    check_frozen(before, state(model), "3.weight", "3.bias")
    assert not (before["0.weight"] == model[0].weight).any()
    assert type(model[3]) is nn.Conv2d


# What runs in training alone, and images


class Auxiliary(nn.Module):
    """A second head, which runs in training; numbers drawn; a counter."""

    def __init__(self, pixels=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.head, self.head_bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.pixels = pixels
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        assert self.pixels in (None, x.shape[-1])
        x = F.dropout(self.bn(self.conv(x)), 0.5, self.training)
        if not self.training:
            return x.mean((2, 3))
        self.count.add_(1)
        return x.mean((2, 3)) + self.head_bn(self.head(x)).mean((2, 3))


def test_the_norm_of_a_head_that_runs_in_training_alone():
    model = Auxiliary()
    before, random = state(model), torch.get_rng_state()
    with frozen_filters(model, {"conv": FROZEN, "head": FROZEN}):
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        train(model)
    parts = ("weight", "bias", "running_mean", "running_var")
    held = [f"{norm}.{part}" for norm in ("bn", "head_bn") for part in parts]
    check_frozen(before, state(model), "conv.weight", "head.weight", *held)
    assert trace_flow(model).norms == {"conv": ["bn"]}
    assert trace_flow(model, training=True).norms == {"conv": ["bn"], "head": ["head_bn"]}


def test_images_say_how_the_data_flows():
    model = Auxiliary(pixels=50)
    before, masks = state(model), {"conv": FROZEN, "head": FROZEN}
    with pytest.raises(ValueError, match="pass images"), frozen_filters(model, masks):
        pass
    inputs = images(size=50)
    with frozen_filters(model, masks, images=inputs):
        train(model, inputs)
    check_frozen(before, state(model), "bn.running_mean", "head_bn.running_mean", "head_bn.weight")


@pytest.mark.parametrize("why", ["no norm is held", "nothing is frozen", "there is no norm"])
def test_nothing_is_traced_where_no_mask_needs_it(why):
    model = Auxiliary(pixels=50)
    frozen = torch.zeros(6, dtype=torch.bool) if why == "nothing is frozen" else FROZEN
    if why == "there is no norm":
        model.bn = model.head_bn = nn.Identity()
    mode = "none" if why == "no norm is held" else "full"
    with frozen_filters(model, {"conv": frozen}, mode):
        train(model, images(size=50))


def test_a_convolution_that_never_runs_is_refused():
    model = build()
    model[0].spare = nn.Conv2d(3, 6, 3).requires_grad_(False)
    with (
        pytest.raises(ValueError, match=r"'0\.spare' did not run"),
        frozen_filters(model, {"0.spare": FROZEN}),
    ):
        pass
