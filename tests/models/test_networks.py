"""Networks by name: torchvision's, users' own, their images, heads and first weights."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from families import SIDES
from permafrost.errors import InputError
from permafrost.models import NETWORKS, build_network, read_weights
from permafrost.models.torchvision_networks import FAMILIES

# The narrowest that there is of each.
WIDTHS = {"resnet18": 0.1, "resnet34": 0.1, "resnet50": 0.1, "mobilenet_v2": 0.1}
IMAGES = [28, 32, (28, 40), 64]
TABLE = Path(__file__).parents[2] / "docs" / "networks.md"


def build(arch, image_size=32, classes=(2, 2), seed=0, **options):
    options = {"width": WIDTHS.get(arch, 1.0)} | options
    return build_network(arch, classes=classes, seed=seed, image_size=image_size, **options)


@pytest.fixture
def own(monkeypatch):
    """Return a function that makes a user's function the network ``own``."""
    list(NETWORKS)

    def name(function):
        monkeypatch.setitem(NETWORKS._things, "own", function)

    return name


def layers(*more):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *more)


@pytest.mark.parametrize("image_size", IMAGES, ids=str)
@pytest.mark.parametrize("arch", ["vgg16", *WIDTHS])
def test_one_image_of_any_size_can_be_learned_from(arch, image_size):
    network = build(arch, image_size, (2, 3), width=0.1).train()
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    network(torch.randn(1, 3, height, width)).sum().backward()
    assert network.view("multi", 1, 2)(torch.randn(2, 3, height, width)).shape == (2, 3)


@pytest.mark.parametrize("arch", ["efficientnet_b0", "convnext_tiny"])
def test_networks_of_one_width(arch):
    network = build(arch, 28).train()
    assert network(torch.randn(1, 3, 28, 28)).shape == (1, 4)
    with pytest.raises(InputError, match=rf"^model\.width: {arch} cannot vary it; allowed: 1$"):
        build(arch, width=0.5)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_large_images_get_torchvisions_own_network(arch):
    import torchvision

    theirs = getattr(torchvision.models, arch)(weights=None).eval()
    ours = build(arch, 64, width=1.0).eval()
    last = theirs.fc if arch == "resnet18" else theirs.classifier[1]
    kept = {
        n: v for n, v in theirs.state_dict().items() if not n.startswith(("fc.", "classifier."))
    }
    ours.features.load_state_dict(kept)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(last(ours.features(images)), theirs(images))


@pytest.mark.parametrize("side", [28, 32, 63])
def test_small_images_keep_their_size_in_the_first_layer(side):
    for arch in ("resnet18", "mobilenet_v2"):
        first = next(m for m in build(arch, side).modules() if isinstance(m, nn.Conv2d))
        assert first(torch.randn(1, 3, side, side)).shape[2:] == (side, side)


def test_width_scales_a_resnet():
    narrow, whole = (build("resnet18", width=width) for width in (0.25, 1.0))
    counts = zip(narrow.features.modules(), whole.features.modules(), strict=True)
    scaled = [(a.out_channels, b.out_channels) for a, b in counts if isinstance(a, nn.Conv2d)]
    assert all(4 * few == many for few, many in scaled)
    assert narrow.channels == 128


def test_weights_depend_on_the_seed_only(same_bits):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build("resnet18", seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_bits(first, build("resnet18", seed=3).state_dict())
    assert not same_bits(first, build("resnet18", seed=4).state_dict())
    three = build("resnet18", classes=(2, 2, 2), seed=3).state_dict()
    assert same_bits(first, {name: three[name] for name in first})


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "vit_b_16", "resnet19"])
def test_another_of_torchvisions(name):
    if name != "squeezenet1_1":
        with pytest.raises(InputError, match=rf"'torchvision:{name}': no classifier of a family"):
            build(f"torchvision:{name}", 64)
        return
    network = build(f"torchvision:{name}", 64, (2, 3))
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert NETWORKS.home(f"torchvision:{name}") == "permafrost.models.torchvision_networks"


def test_all_families_of_the_table_are_allowed():
    rows = re.findall(r"^\| (\w+) \| \d+ \|", TABLE.read_text(), re.MULTILINE)
    assert set(rows) == set(SIDES)
    assert all(name.startswith(FAMILIES) for name in rows)
    assert all(
        any(name.startswith(family) for name in [*rows, "wide_resnet"]) for family in FAMILIES
    )


def test_a_function_takes_what_it_names(own):
    own(lambda image_size, width: layers(nn.Conv2d(4, round(10 * width) + image_size[0], 1)))
    assert build("own", (28, 40), width=0.5).channels == 33
    with pytest.raises(InputError, match=r"^model\.batch_norm: own cannot vary it; allowed: true$"):
        build("own", batch_norm=False)


def test_features_may_be_pooled(own):
    own(lambda: layers(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    network = build("own", classes=(2, 3))
    assert (network.channels, network.is_pooled) == (16, True)
    assert [*dict(network.view("multi", 1, 2).named_children())] == ["features", "head"]
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: 3, r"own returns int; wanted: a torch\.nn\.Module"),
        (lambda: nn.Flatten(), "own has no Conv2d, whose filters could be ranked"),
        (lambda: 1 / 0, r"own cannot be made \(ZeroDivisionError"),
        (lambda: nn.Conv2d(1, 2, 3), r"cannot take images of 32 x 32 pixels \(RuntimeError"),
        (lambda: layers(nn.Flatten(2)), r"maps images to shape \(2, 4, 900\); wanted: features"),
    ],
    ids=["no module", "no convolution", "fails", "other channels", "other shape"],
)
def test_what_is_no_network(own, make, told):
    own(make)
    with pytest.raises(InputError, match=rf"^model\.arch: .*{told}"):
        build("own")


def test_unknown_network():
    with pytest.raises(
        InputError, match=r"network 'vgg12' is unknown: use one of .*resnet18.*vgg16"
    ):
        build("vgg12")


def test_heads_grow(same_bits):
    network = build("resnet18", classes=(2,))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.add_head(3)
    assert network.classes == (2, 3)
    assert same_bits(before, {name: network.state_dict()[name] for name in before})
    assert network.view("expanding", 1, 2)(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert network.heads[1].weight.std().item() == pytest.approx(0.01, rel=0.3)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("names", ["body", "classifier", "permafrost"])
def test_first_weights(tmp_path, same_bits, suffix, names):
    there = build("resnet18", seed=5)
    weights = dict(there.features.state_dict())
    if names == "classifier":
        weights |= {"fc.weight": torch.zeros(1000, 51), "fc.bias": torch.zeros(1000)}
    if names == "permafrost":
        weights = dict(there.state_dict())
    path = tmp_path / f"weights.{suffix}"
    save_file(
        {n: v.contiguous() for n, v in weights.items()}, path
    ) if suffix == "safetensors" else torch.save(weights, path)
    here = build("resnet18", seed=6, weights=read_weights(path))
    assert same_bits(here.features.state_dict(), there.features.state_dict())
    assert same_bits(here.heads.state_dict(), build("resnet18", seed=6).heads.state_dict())


def test_weights_of_torchvisions_vgg():
    from torchvision.models import vgg11_bn

    theirs = {n: v for n, v in vgg11_bn().state_dict().items() if not n.startswith("classifier.")}
    ours = build("vgg11", width=1.0, weights=theirs).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("layer1.0.conv1.weight"), "has no layer1.0.conv1.weight, which resnet18"),
        (
            lambda w: w.update({"conv1.weight": torch.zeros(6, 3, 7, 7)}),
            r"shape \(6, 3, 7, 7\), but",
        ),
        (lambda w: w.update({"layer1.2.conv1.weight": torch.zeros(1)}), "which resnet18 has not"),
    ],
    ids=["less", "of another shape", "more"],
)
def test_weights_of_another_network(change, told):
    weights = dict(build("resnet18").features.state_dict())
    change(weights)
    with pytest.raises(InputError, match=rf"^model\.weights: .*{told}"):
        build("resnet18", weights=weights)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [None, b"", b"weights"], ids=["absent", "empty", "text"])
def test_files_that_hold_no_weights(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(
        InputError, match=r"^model\.weights: .*w\.\w+ (is not there|cannot be read)"
    ):
        read_weights(tmp_path / name)


def test_nothing_is_unpickled(tmp_path):
    torch.save({"conv1.weight": Path("/")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth cannot be read"):
        read_weights(tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth is no state dict"):
        read_weights(tmp_path / "w.pth")
