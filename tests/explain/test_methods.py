"""Every saliency method: in-place networks, classes, refusals, and a model left as it was."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from explained import CLASSES, DECOMPOSED, SharedReLU, mixed, small_vgg, snapshot, some_images
from permafrost.errors import InputError
from permafrost.explain import SALIENCY_METHODS, class_saliency, fullgrad, saliency_maps
from permafrost.names import check_names
from permafrost.params import Params


def assert_same(before: dict, after: dict) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0)


# Every method


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_maps_are_not_negative_and_record_nothing(method):
    model, (images, targets) = small_vgg(), some_images()
    recorded = saliency_maps(model, images.clone().requires_grad_(), targets, method)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = saliency_maps(model, images, targets, method)
    assert torch.equal(maps, recorded)
    assert maps.shape == (4, 20, 24)
    assert maps.dtype == torch.float64
    assert maps.min() >= 0
    assert maps.max() > 0
    assert not recorded.requires_grad


@pytest.mark.parametrize("method", SALIENCY_METHODS)
@pytest.mark.parametrize("build", [small_vgg, SharedReLU])
def test_in_place_equals_out_of_place(build, method):
    images, targets = some_images()
    inside = saliency_maps(build(inplace=True), images, targets, method)
    torch.testing.assert_close(
        inside, saliency_maps(build(inplace=False), images, targets, method), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("method", SALIENCY_METHODS)
@pytest.mark.parametrize("build", [small_vgg, SharedReLU])
def test_a_batch_equals_one_at_a_time(build, method):
    model, (images, targets) = build().train(), some_images()
    together = saliency_maps(model, images, targets, method)
    for index in range(len(images)):
        part = slice(index, index + 1)
        alone = saliency_maps(model, images[part], targets[part], method)
        torch.testing.assert_close(together[part], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_every_target_has_its_own_map(method):
    model, (images, _) = small_vgg(), some_images(1)
    maps = [saliency_maps(model, images, torch.tensor([k]), method) for k in range(CLASSES)]
    assert all(not torch.allclose(maps[0], other) for other in maps[1:])


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_the_model_and_the_images_are_unchanged(method):
    model, (images, targets) = mixed(small_vgg()), some_images()
    before, kept = snapshot(model), images.clone()
    saliency_maps(model, images, targets, method)
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match="finite"):
        saliency_maps(model, images * torch.nan, targets, method)
    with pytest.raises(RuntimeError):
        saliency_maps(model, images[:, :2], targets, method)
    assert_same(before, snapshot(model))
    assert torch.equal(images, kept)
    assert not images.requires_grad


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_a_network_that_begins_in_place_does_not_change_the_images(method):
    model, (images, targets) = nn.Sequential(nn.ReLU(inplace=True), *small_vgg()), some_images()
    kept = images.clone()
    maps = saliency_maps(model, images, targets, method)
    assert torch.equal(images, kept)
    after = nn.Sequential(nn.ReLU(inplace=False), *small_vgg(inplace=False))
    torch.testing.assert_close(saliency_maps(after, images, targets, method), maps)


# Refusals


@pytest.mark.parametrize("method", SALIENCY_METHODS)
@pytest.mark.parametrize("target", [-1, CLASSES])
def test_a_target_that_is_no_logit_is_refused(method, target):
    images, _ = some_images(1)
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.4"):
        saliency_maps(small_vgg(), images, torch.tensor([target]), method)


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_shapes_that_do_not_fit_are_refused(method):
    images, targets = some_images()
    for wrong in [(images, targets[:2]), (images[0], targets[:3])]:
        with pytest.raises(ValueError, match="images must be"):
            saliency_maps(small_vgg(), *wrong, method)
    with pytest.raises(ValueError, match="logits"):
        saliency_maps(small_vgg()[:4], images, targets, method)


def test_an_unknown_method_is_refused():
    images, targets = some_images()
    with pytest.raises(InputError, match=r"saliency method 'grad_cam' is unknown.*gradcam"):
        saliency_maps(small_vgg(), images, targets, "grad_cam")
    with pytest.raises(InputError, match=r"saliency method 'grad_cam' is unknown.*gradcam"):
        class_saliency(small_vgg(), [(images, targets)], CLASSES, method="grad_cam")
    unknown = r"saliency.method: 'grad_cam' is no saliency method; allowed: .*gradcam"
    with pytest.raises(InputError, match=unknown):
        check_names(Params(saliency={"method": "grad_cam"}), "params.yaml")


def test_the_methods_of_the_parameters():
    assert Params().saliency.method == "fullgrad"
    for method in SALIENCY_METHODS:
        check_names(Params(saliency={"method": method}), "params.yaml")


def test_captum_is_imported_only_when_it_is_used():
    check = "import sys, permafrost.names; assert 'captum' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


# Classes


@pytest.mark.parametrize("method", SALIENCY_METHODS)
def test_a_class_map_is_the_rescaled_mean_of_its_images_maps(method):
    model, (images, _) = small_vgg(), some_images(5)
    with torch.no_grad():
        model[-1].weight[:2].abs_()  # so that something speaks for either class
    labels = torch.tensor([1, 0, 1, 1, 0])
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    result = class_saliency(model, batches, 2, method=method)
    maps = saliency_maps(model, images, labels, method)
    for label in range(2):
        mean = maps[labels == label].mean(0)
        expected = (mean - mean.min()) / (mean.max() - mean.min())
        torch.testing.assert_close(result.maps[label], expected, rtol=1e-9, atol=1e-9)
    if method in DECOMPOSED:
        assert 0 <= result.completeness < 1e-10
    else:
        assert result.completeness is None


def test_fullgrad_is_the_default():
    model, (images, targets) = small_vgg(), some_images()
    assert torch.equal(saliency_maps(model, images, targets), fullgrad(model, images, targets))
    batches = [(images, targets)]
    default, named = (class_saliency(model, batches, 4, **o) for o in ({}, {"method": "fullgrad"}))
    assert torch.equal(default.maps, named.maps)


@pytest.mark.parametrize("method", ["fullgrad", "simple_fullgrad", "smooth_fullgrad"])
def test_reading_reaches_the_fullgrad_methods(method):
    model, (images, targets) = small_vgg(), some_images()
    layer, channel = (
        saliency_maps(model, images, targets, method, reading=reading)
        for reading in ("layer", "channel")
    )
    assert not torch.allclose(layer, channel)
    with pytest.raises(ValueError, match="reading"):
        saliency_maps(model, images, targets, method, reading="other")


def test_smooth_completeness_is_the_worst_copys():
    """A logit that is broken by 1 is missed by about as much in every copy."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = small_vgg()

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images) + 1

    images, targets = some_images()
    with pytest.warns(UserWarning, match="no module"):
        result = class_saliency(Broken(), [(images, targets)], 4, method="smooth_fullgrad")
    assert result.completeness > 1e-2
