"""Biases of any layer, or of none, are in FullGrad's map; what is missing is told."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.models import googlenet
from torchvision.ops.misc import FrozenBatchNorm2d

from permafrost.data import Batches, LabeledImages, Normalization
from permafrost.explain import (
    completeness_error,
    fullgrad,
    gradcam,
    is_piecewise_linear,
    saliency_maps,
    smooth_fullgrad,
    start_image,
    visualize_filters,
)
from permafrost.models import build_network

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([0, 1])


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class OwnConv(nn.Module):
    """A convolution of no class, with the bias added apart."""

    def __init__(self, together):
        super().__init__()
        self.together = together
        self.w, self.b = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        if self.together:
            return F.conv2d(x, self.w, bias=self.b)
        x = F.conv2d(x, self.w)
        x += self.b.view(1, -1, 1, 1)
        return 0.25 - torch.sub(x, self.b.view(-1, 1, 1), alpha=0.5)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.conv(F.relu_(self.conv(x))), x], 1)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(1, 6, (3, 3, 3)), nn.BatchNorm3d(6)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x.unsqueeze(1)))).squeeze(2)


def vary(module):
    for name in ("running_mean", "running_var", "weight", "bias"):
        value = getattr(module, name, None)
        if isinstance(value, torch.Tensor) and value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    return module


def weight_normed():
    return parametrizations.weight_norm(nn.Conv2d(3, 6, 3))


BODIES = {
    "transposed": lambda: nn.ConvTranspose2d(3, 6, 3, stride=2),
    "functional": lambda: OwnConv(True),
    "bias added apart": lambda: OwnConv(False),
    "norm with its activation": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), NormAndActivation(6)),
    "standardized": lambda: StandardizedConv(3, 6, 3),
    "frozen norm": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6)),
    "synchronised norm": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6)),
    "instance norm that keeps statistics": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    ),
    "weight norm": weight_normed,
    "run twice": Twice,
    "three dimensions": Deep,
}


def network(body, activation=nn.ReLU):
    layers = [body, activation(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("name", BODIES)
def test_the_terms_add_up(name):
    torch.manual_seed(0)
    body = BODIES[name]()
    for module in body.modules():
        vary(module)
    model = network(body)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fullgrad(model, X, TARGETS)
    assert completeness_error(model, X, TARGETS).max() < 1e-10
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.SyncBatchNorm])
def test_other_norms_give_the_map_of_batch_norm(norm):
    torch.manual_seed(0)
    plain = network(nn.Sequential(nn.Conv2d(3, 6, 3), vary(nn.BatchNorm2d(6))))
    model = network(nn.Sequential(nn.Conv2d(3, 6, 3), norm(6)))
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(fullgrad(model, X, TARGETS), fullgrad(plain, X, TARGETS))


@pytest.mark.parametrize("method", ["fullgrad", "smooth_fullgrad"])
@pytest.mark.parametrize(
    ("body", "told"),
    [
        (nn.GroupNorm(2, 6), r"'0\.1' \(GroupNorm\)"),
        (nn.InstanceNorm2d(6, affine=True), r"'0\.1' \(InstanceNorm2d\)"),
        (nn.SiLU(), r"'0\.1' \(SiLU\)"),
        (nn.ReLU6(), r"'0\.1' \(ReLU6\)"),
    ],
)
def test_what_is_missing_is_told_once(body, told, method):
    torch.manual_seed(0)
    model = network(nn.Sequential(nn.Conv2d(3, 6, 3), vary(body)))
    nn.init.constant_(model[0][0].bias, 7)
    with pytest.warns(UserWarning, match=told) as seen:
        saliency_maps(model, X, TARGETS, method)
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)


def test_what_no_module_does_is_told():
    class Squared(nn.Module):
        def forward(self, x):
            return self.net(x).square()

    model = Squared()
    model.net = network(nn.Conv2d(3, 6, 3))
    with pytest.warns(UserWarning, match="no module"):
        fullgrad(model, X, TARGETS)


@pytest.mark.parametrize("layer", [NormAndActivation(3), StandardizedConv(3, 3, 1)])
def test_a_subclass_with_its_own_forward_is_not_known_to_be_piecewise_linear(layer):
    assert not is_piecewise_linear(nn.Sequential(layer, nn.ReLU()))
    layer.activation = nn.ReLU()
    assert not is_piecewise_linear(nn.Sequential(layer, nn.ReLU()))


def test_layers_with_derived_weights_are_piecewise_linear():
    assert is_piecewise_linear(nn.Sequential(weight_normed(), nn.ReLU()))


class Backwards(nn.Module):
    """Registered last to first, with an auxiliary head that runs in training mode alone."""

    def __init__(self):
        super().__init__()
        self.fc, self.last, self.first = nn.Linear(4, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(3, 6, 3)
        self.aux = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = F.relu(self.first(x))
        aux = self.aux(x) if self.training else None
        x = self.fc(F.relu(self.last(x)).mean((2, 3)))
        return (x, aux) if self.training else x


def test_grad_cam_takes_the_convolution_that_runs_last():
    torch.manual_seed(0)
    model = Backwards().double()
    layers = [model.first, nn.ReLU(), model.last, nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    plain = nn.Sequential(*layers, nn.Flatten(), model.fc)
    found = gradcam(model, X, TARGETS)
    assert found.any()
    torch.testing.assert_close(found, gradcam(plain, X, TARGETS))


def test_a_layer_that_does_not_run_in_eval_mode_is_refused():
    with pytest.raises(ValueError, match="eval mode"):
        visualize_filters(Backwards(), "aux", start=X[0].float(), steps=1)


def test_googlenet_is_explained_with_its_auxiliary_heads():
    torch.manual_seed(0)
    model = googlenet(num_classes=3, init_weights=False, transform_input=True)
    images = F.interpolate(X.float(), 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fullgrad(model, images, [0, 1])
    assert gradcam(model, images, [0, 1]).any()


def test_pictures_of_a_convolution_with_its_activation():
    """Its slope changes from step to step."""

    class ConvAndActivation(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).square()

    torch.manual_seed(0)
    one = nn.Sequential(ConvAndActivation(3, 2, 3).double())
    found = visualize_filters(one, "0", [0], start=X[0], steps=3, weight_decay=0)
    image = X[:1].clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (-one(image)[0, 0].mean()).backward()
        optimizer.step()
    torch.testing.assert_close(found, image.detach())


# What is asked of the outputs, the targets and the images


@pytest.mark.parametrize("method", ["fullgrad", "gradcam", "integrated_gradients"])
@pytest.mark.parametrize(
    "wrap", [lambda x: (x, None), lambda x: {"logits": x}], ids=["tuple", "dict"]
)
def test_outputs_that_are_no_tensor_are_refused(method, wrap):
    class Wrapped(nn.Module):
        def forward(self, x):
            return wrap(self.net(x))

    model = Wrapped()
    model.net = network(nn.Conv2d(3, 6, 3))
    with pytest.raises(ValueError, match="logits"):
        saliency_maps(model, X, TARGETS, method)


@pytest.mark.parametrize("method", ["fullgrad", "simple_fullgrad", "smooth_fullgrad", "gradcam"])
@pytest.mark.parametrize(
    "targets",
    [[0, 1], (0, 1), TARGETS.int(), TARGETS.numpy()],
    ids=["list", "tuple", "Tensor", "ndarray"],
)
def test_targets_may_be_a_sequence(method, targets):
    torch.manual_seed(0)
    model = network(nn.Conv2d(3, 6, 3))
    right = saliency_maps(model, X, TARGETS, method)
    assert torch.equal(saliency_maps(model, X, targets, method), right)


@pytest.mark.parametrize("targets", [[0.5, 1.0], ["a", "b"], TARGETS.bool(), 3, None])
def test_targets_that_are_no_whole_numbers_are_refused(targets):
    with pytest.raises(ValueError, match="targets must be"):
        fullgrad(network(nn.Conv2d(3, 6, 3)), X, targets)


def test_short_images_are_refused():
    model = network(nn.Conv2d(3, 6, 3)).float()
    with pytest.raises(ValueError, match=r"images\.float\(\)"):
        fullgrad(model, X.bfloat16(), TARGETS)
    with pytest.raises(ValueError, match=r"start\.float\(\)"):
        visualize_filters(model, "0", start=X[0].bfloat16())


# Random draws do not depend on the default type


def draws():
    model = network(nn.Conv2d(3, 6, 3, dtype=torch.float32)).float()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float32))
    data = LabeledImages(torch.arange(240).view(5, 3, 4, 4).to(torch.uint8), torch.arange(5))
    batches = Batches(data, Normalization((0.5,) * 3, (0.5,) * 3), torch.device("cpu"))
    epoch = batches.epoch(torch.Generator().manual_seed(0), 5, padding=1, flip=True)
    built = build_network("vgg11", width=0.02, batch_norm=True, classes=[2, 2], seed=0)
    return {
        "smooth": smooth_fullgrad(model, X.float(), TARGETS),
        "start": start_image(8, (0.5,) * 3, (0.2,) * 3, seed=0),
        "batch": next(iter(epoch))[0],
        **built.state_dict(),
    }


def test_draws_are_float32_whatever_the_default_type():
    right = draws()
    torch.set_default_dtype(torch.float64)
    try:
        found = draws()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, values in right.items():
        assert values.dtype == found[name].dtype, name
        assert torch.equal(values, found[name]), name
