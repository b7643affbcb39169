"""Second derivatives, functions of functions, and compiled networks."""

import copy

import pytest
import torch
from torch import nn

from held import ALL, FROZEN, build, check_frozen, filters, images, state, train


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
