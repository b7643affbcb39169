"""Held layers stay the layers that they are: whatever is done with a network goes on working.

By frozen filters or by single weights, which are held in the same way.
"""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from permafrost.freezing import frozen_filters, frozen_weights, plain_copy
from permafrost.models.units import trace_flow

FROZEN = torch.tensor([True, True, False, False, False, True])


def images(count=4, size=12, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def build(conv=nn.Conv2d, norm=nn.BatchNorm2d, **options):
    """Return two convolutions, a norm behind the first, of which no value is its initial one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 6, 3, **options), norm(6), nn.Tanh(), nn.Conv2d(6, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    with torch.no_grad():
        for value in [*model.parameters(), *model[1].buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5)
    return model


def train(model, inputs=None, steps=3):
    inputs = images() if inputs is None else inputs
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def filters(model, mode="full", masks=None):
    return frozen_filters(model, masks or {"0": FROZEN, "3": FROZEN}, mode)


def element_masks(model):
    masks = {name: torch.zeros_like(model.get_parameter(name)) for name in ("0.weight", "3.weight")}
    for mask in masks.values():
        mask[FROZEN] = 1
    return {name: mask.bool() for name, mask in masks.items()}


def weights(model):
    """Hold the same rows of the weights alone, and the norm as a whole."""
    return frozen_weights(model, element_masks(model), batch_norms=True)


HOLD = pytest.mark.parametrize("hold", [filters, weights])


def state(model):
    return copy.deepcopy(model.state_dict())


def check_frozen(before, after, *names):
    """Frozen rows have the same bits and live ones have moved."""
    for name in names:
        assert torch.equal(before[name][FROZEN], after[name][FROZEN]), name
        assert not torch.equal(before[name][~FROZEN], after[name][~FROZEN]), name


NORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
ALL = ("0.weight", "0.bias", "3.weight", "3.bias", *NORM)


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


# Layers that compute in their own way


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


# Second derivatives, and functions of functions


class Mixed(nn.Module):
    """BatchNorm in training by hand, of which frozen channels use the running statistics."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        mean = torch.where(FROZEN, self.norm.running_mean, mean)
        var = torch.where(FROZEN, self.norm.running_var, var)
        x = (x - mean[:, None, None]) / (var + self.norm.eps).sqrt()[:, None, None]
        return x * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


def penalty_gradients(model, inputs, parameters):
    """Differentiate a gradient penalty, as WGAN-GP has it."""
    (gradient,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
    loss = gradient.square().sum()
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"bias": False}, {"groups": 3}],
    ids=str,
)
def test_second_derivatives_are_the_plain_networks(options, training):
    model = build(**options).double().train(training)
    plain, inputs = copy.deepcopy(model), images(dtype=torch.float64).requires_grad_()
    names = [name for name, _ in model.named_parameters()]
    expected_parameters = dict(plain.named_parameters())
    if training:
        plain[1] = Mixed(plain[1])
    expected = penalty_gradients(plain, inputs, [expected_parameters[name] for name in names])
    with filters(model):
        live = [getattr(rows, "live", rows) for rows in (part(model, name) for name in names)]
        found = penalty_gradients(model, inputs, live)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        theirs = theirs if name.startswith("6") else theirs[~FROZEN]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


def part(model, name):
    layer, _, attribute = name.rpartition(".")
    held = model.get_submodule(layer)
    return getattr(held, f"{attribute}_rows", None) or getattr(held, attribute)


def test_gradients_of_each_image_by_functions_of_functions():
    model = build().double().eval()
    plain, batch = copy.deepcopy(model), images(dtype=torch.float64)

    def of_each(network):
        def loss(parameters, image):
            answer = torch.func.functional_call(network, parameters, (image[None],))
            return answer.square().sum()

        values = {name: value.detach() for name, value in network.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(values, batch)

    expected = of_each(plain)
    with filters(model):
        found = of_each(model)
    for name in ("0.weight", "3.weight", "3.bias"):
        ours = found[f"{name}_rows.live"]
        torch.testing.assert_close(ours, expected[name][:, ~FROZEN], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["6.weight"], expected["6.weight"])


def test_a_compiled_network():
    """One that has compiled the plain network before."""
    torch._dynamo.reset()
    ours, plain = build(), build()
    compiled = torch.compile(ours, backend="aot_eager")
    compiled.eval()(images())
    start = state(ours)
    with filters(plain):
        train(plain)
    with filters(compiled, masks={"_orig_mod.0": FROZEN, "_orig_mod.3": FROZEN}):
        train(compiled)
        inside = compiled.eval()(images())
    check_frozen(start, state(ours), *ALL)
    torch.testing.assert_close(compiled(images()), inside)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    torch._dynamo.reset()


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
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved]
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


# What is refused


class Gained(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(6, 1, 1, 1))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.gain, self.bias)


class Normed(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.BatchNorm2d(6, affine=False)

    def forward(self, x):
        return self.norm(super().forward(x))


def changed(model, change):
    change(model)
    return model


def tie(model):
    model[0] = nn.Conv2d(6, 6, 3)
    model[0].weight = model[3].weight
    model.insert(0, nn.Conv2d(3, 6, 1))


def tie_memory(model):
    tie(model)
    model[1].weight = nn.Parameter(model[4].weight.data)


def replace_forward(model):
    plain = model[1].forward
    model[1].forward = lambda x: plain(x)


REFUSED = {
    "weight_norm": (lambda m: nn.utils.weight_norm(m[0]), "remove_weight_norm"),
    "spectral_norm": (lambda m: nn.utils.spectral_norm(m[0]), "remove_spectral_norm"),
    "parametrization": (lambda m: parametrizations.weight_norm(m[0]), "remove_parametrizations"),
    "prune": (lambda m: prune.l1_unstructured(m[0], "weight", 0.5), r"prune\.remove"),
    "prune a bias": (lambda m: prune.l1_unstructured(m[0], "bias", 0.5), r"'bias'\)"),
    "parametrised γ": (lambda m: parametrizations.weight_norm(m[1]), "weight of '1' is derived"),
    "gradient hook": (lambda m: m[0].weight.register_hook(lambda g: g), "'0.weight' has hooks"),
    "tied": (tie, "'1.weight' and '4.weight' are one parameter"),
    "tied memory": (tie_memory, "'1.weight' and '4.weight' are one parameter"),
    "gain": (lambda m: m.__setitem__(0, Gained(3, 6, 3)), "'0' .*'gain'.* requires_grad_"),
    "norm inside": (lambda m: m.__setitem__(0, Normed(3, 6, 3)), "'0' has a norm inside"),
    "lazy": (lambda m: m.__setitem__(0, nn.LazyConv2d(6, 3)), "not initialised"),
    "forward": (replace_forward, "forward of '1' was replaced"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("why", list(REFUSED))
def test_what_could_move_frozen_filters_is_refused_in_one_line(why):
    change, message = REFUSED[why]
    model = changed(build(), change)
    types = [type(layer) for layer in model]
    masks = {n: FROZEN for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    with pytest.raises(ValueError, match=message) as caught, frozen_filters(model, masks):
        pass
    assert "\n" not in str(caught.value)
    assert [type(layer) for layer in model] == types


def test_what_does_not_require_a_gradient_may_stay_beside_a_filter():
    model = changed(build(), REFUSED["gain"][0])
    model[0].gain.requires_grad_(False)
    before = state(model)
    with filters(model):
        train(model)
    check_frozen(before, state(model), *ALL)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("why", ["weight_norm", "parametrization", "prune", "lazy"])
def test_single_weights_that_are_derived_are_refused(why):
    change, message = REFUSED[why]
    model = changed(build(), change)
    masks = {"0.weight": torch.ones(6, 3, 3, 3).bool()}
    with pytest.raises(ValueError, match=message), frozen_weights(model, masks):
        pass


@pytest.mark.parametrize("change", [tie, tie_memory])
def test_single_weights_that_are_tied_are_refused(change):
    model = changed(build(), change)
    masks = {"4.weight": torch.ones(6, 6, 3, 3).bool()}
    with pytest.raises(ValueError, match="are one parameter"), frozen_weights(model, masks):
        pass


def test_single_weights_that_others_are_derived_from_are_held():
    model = build()
    prune.l1_unstructured(model[0], "weight", 0.5)
    mask = FROZEN[:, None, None, None].expand(6, 3, 3, 3)
    before = state(model)
    with frozen_weights(model, {"0.weight_orig": mask}):
        train(model)
        inside = model.eval()(images())
    check_frozen(before, state(model), "0.weight_orig")
    assert torch.equal(model(images()), inside)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("mode", ["full", "none", None])
def test_inference_mode_and_torchscript_are_refused(mode):
    model = build()
    masks = element_masks(model)

    def hold(model):
        return filters(model, mode) if mode else frozen_weights(model, masks)

    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"), hold(model):
        pass
    with pytest.raises(ValueError, match="TorchScript"), hold(torch.jit.script(model)):
        pass
