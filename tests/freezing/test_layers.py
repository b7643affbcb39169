"""Layers that compute in their own way are held as the plain ones are, or refused."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from held import ALL, HOLD, NORM, build, check_frozen, filters, images, state, train, weights
from permafrost.freezing import layers


class Standardised(nn.Conv2d):
    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) * (var + 1e-5).rsqrt(), self.bias)


class Scaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Super(nn.BatchNorm2d):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class Explicit(nn.BatchNorm2d):
    def forward(self, x):
        return torch.tanh(nn.BatchNorm2d.forward(self, x))


class Functional(nn.BatchNorm2d):
    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        return torch.tanh(
            F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum)
        )


@pytest.mark.parametrize("conv", [Standardised, Scaled])
@HOLD
def test_a_convolution_with_a_forward_of_its_own(hold, conv):
    model = build(conv)
    before, outside = state(model), model.eval()(images())
    with hold(model):
        assert torch.equal(model(images()), outside)
        train(model)
        inside = model.eval()(images())
    assert torch.equal(model(images()), inside)
    check_frozen(before, state(model), "0.weight", "3.weight")


@pytest.mark.parametrize("mode", ["full", "affine"])
@pytest.mark.parametrize("norm", [Super, Explicit, Functional])
def test_a_norm_that_contains_its_activation_is_a_norm_before_it(norm, mode):
    ours, plain = build(norm=norm), build()
    ours[2] = nn.Identity()
    before, outside = state(ours), ours.eval()(images())
    for model in (ours, plain):
        with filters(model, mode):
            if model is ours:
                assert torch.equal(model(images()), outside)
            train(model)
    for name, value in plain.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(ours.state_dict()[name], value), name
    held = ALL if mode == "full" else ALL[:-2]
    check_frozen(before, state(ours), *held)


@pytest.mark.parametrize("norm", [Super, Explicit, Functional])
def test_single_weights_beside_a_norm_that_contains_its_activation(norm):
    model = build(norm=norm)
    before, outside = state(model), model.eval()(images())
    with weights(model):
        assert torch.equal(model(images()), outside)
        train(model)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in NORM)


class ByHand(nn.BatchNorm2d):
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x, (0, 2, 3))
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var, 0.1)
        x = (x - mean[:, None, None]) / (var + self.eps).sqrt()[:, None, None]
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def tracking_instance_norm(channels):
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


@pytest.mark.parametrize("norm", [ByHand, tracking_instance_norm])
def test_a_norm_that_does_not_call_batch_norm_keeps_its_affine_part_or_is_refused(norm):
    model = build(norm=norm)
    before, outside = state(model), model.eval()(images())
    with filters(model):
        assert torch.equal(model(images()), outside)
        with pytest.raises(ValueError, match=r"'1' .* pass batch_norm=\"affine\"$"):
            model.train()(images())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with filters(model, "affine"):
        train(model)
    check_frozen(before, state(model), *ALL[:-2])
    assert (before["1.running_mean"] != model[1].running_mean).all()


def test_a_synchronised_norm_is_one_that_is_not_on_a_single_process():
    ours, plain = build(norm=nn.SyncBatchNorm), build()
    before = state(ours)
    for model in (ours, plain):
        with filters(model):
            train(model)
    check_frozen(before, state(ours), *ALL)
    assert all(torch.equal(ours.state_dict()[n], value) for n, value in plain.state_dict().items())


def test_a_norm_that_never_moves():
    from torchvision.ops import FrozenBatchNorm2d

    for hold in (filters, weights):
        model = build(norm=FrozenBatchNorm2d)
        before = state(model)
        with hold(model):
            train(model)
        check_frozen(before, state(model), "0.weight")
        assert all(torch.equal(before[name], model.state_dict()[name]) for name in NORM)


@pytest.mark.parametrize("mode", ["full", "affine"])
@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"affine": False}])
def test_norms_that_have_less_to_hold(options, mode):
    model = build(norm=lambda channels: nn.BatchNorm2d(channels, **options))
    before = state(model)
    refused = mode == "full" and "track_running_stats" in options
    with (
        pytest.raises(ValueError, match="without running stat") if refused else nullcontext(),
        filters(model, mode),
    ):
        train(model)
    if not refused:
        held = {"full": NORM, "affine": NORM[:2]}[mode]
        check_frozen(before, state(model), "0.weight", *[n for n in held if n in before])


@pytest.mark.parametrize(
    "optimize",
    [
        partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1),
        partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_frozen_rows_learn_the_same_in_the_form_for_gpus(monkeypatch, optimize):
    """There the optimizer moves whole copies; what is frozen is read from elsewhere."""
    states = []
    for spare in (False, True):
        monkeypatch.setattr(layers, "_has_arithmetic_to_spare", lambda _, spare=spare: spare)
        model = build().double()
        before = state(model)
        with filters(model):
            assert all(p.shape[0] == (6 if spare else 3) for p in model[:4].parameters())
            train(model, images(dtype=torch.float64), make_optimizer=optimize)
        check_frozen(before, state(model), *ALL)
        states.append(state(model))
    # Adam blows up the rounding of a gradient that is zero: of a bias before a norm.
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-7)
