"""What could move what is held is refused in one line."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from held import ALL, FROZEN, build, check_frozen, element_masks, filters, images, state, train
from permafrost.freezing import frozen_filters, frozen_weights


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
