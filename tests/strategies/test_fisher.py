"""Fisher information by hand, by loops, in any batches."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lessons import copied_state, random
from permafrost.strategies import fisher
from permafrost.strategies.fisher import fisher_diagonal


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


class Odd(nn.Module):
    """What has no closed form, beside what has: groups, layers used twice, shared, by function."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.called = nn.Conv2d(4, 4, 1)
        self.wide = nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular")
        self.tokens = nn.Linear(6, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = nn.Linear(5, 5).weight
        self.other = nn.Linear(5, 5)
        self.other.weight = self.tied.weight
        self.folded = nn.Linear(5, 5)  # sees positions as if they were images
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        x = self.norm(self.depthwise(self.plain(images)).relu_())
        x = self.twice(self.twice(x).sigmoid())
        x = torch.conv2d(x, self.called.weight, self.called.bias)
        x = self.tokens(self.wide(x).permute(0, 2, 3, 1)).tanh()
        x = self.folded(x.flatten(0, 2)).view_as(x).sin()
        return self.head(self.other(self.tied(x).sin()).mean((1, 2)))


@pytest.fixture(params=["vgg", "odd"])
def any_case(request, fisher_case):
    """Return the same of a network that has other layers too."""
    if request.param == "vgg":
        return fisher_case
    model = Odd().double().eval()
    images = torch.randn(5, 3, 11, 9, generator=random(), dtype=torch.float64)
    return model, images, [name for name, _ in model.named_parameters()]


def test_fisher_is_what_a_loop_over_images_and_classes_finds(any_case):
    view, images, names = any_case
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
def test_fisher_does_not_depend_on_the_batches(any_case, monkeypatch, sizes):
    view, images, names = any_case
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
