"""What is explained, ranked or measured computes in true float32, whatever the switches."""

import itertools

import pytest
import torch
from torch import nn

from permafrost.data import Batches, LabeledImages, Normalization
from permafrost.evaluation.accuracy import accuracy
from permafrost.evaluation.drift import response_drift
from permafrost.explain import (
    SALIENCY_METHODS,
    class_saliency,
    completeness_error,
    fullgrad,
    saliency_maps,
    visualize_filters,
)
from permafrost.models import float32_as, measuring
from permafrost.models.scopes import _SWITCHES
from permafrost.ranking import RESPONSES, filter_responses
from permafrost.strategies.fisher import fisher_diagonal
from permafrost.training import TrainingConfig, TrainingState, fit

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1, 0])


def switches():
    return [switch.fp32_precision for switch in _SWITCHES]


class Watch(nn.Identity):
    """Notes, forwards and backwards, how float32 is multiplied and whether autocast is on."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def note(self, *_):
        on = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
        self.seen.add((*switches(), *on, self.training))

    def forward(self, x):
        self.note()
        if x.requires_grad and not torch._C._are_functorch_transforms_active():
            x.register_hook(self.note)
        return x


def network(watch=Watch):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), watch(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def batches():
    images = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8)
    data = LabeledImages(images, torch.tensor([0, 1] * 3))
    return Batches(data, Normalization((0.5,) * 3, (0.5,) * 3), torch.device("cpu"))


MEASUREMENTS = {
    **{name: lambda m, name=name: saliency_maps(m, X, LABELS, name) for name in SALIENCY_METHODS},
    **{
        name: lambda m, name=name: filter_responses(m, [(X, LABELS)], 2, [name], X[:2].mean(1))
        for name in RESPONSES
        if not name.startswith("relevance")  # watches by a copy of the network
    },
    "class_saliency": lambda m: class_saliency(m, [(X, LABELS)], 2),
    "completeness": lambda m: completeness_error(m, X, LABELS),
    "pictures": lambda m: visualize_filters(m, "4", start=X[0], steps=2),
    "fisher": lambda m: fisher_diagonal(m, [(X, LABELS)], ["0.weight"]),
    "accuracy": lambda m: accuracy(m, batches(), 2),
    "drift": lambda m: response_drift(m, network(), batches(), ["4"]),
}


@pytest.fixture
def loose_switches():
    """A process that has asked for every shortcut that there is."""
    before = torch.backends.fp32_precision
    older = torch.get_float32_matmul_precision()
    leaves = [(switch, switch.fp32_precision) for switch in _SWITCHES[1:]]
    torch.backends.fp32_precision = "tf32"
    torch.backends.mkldnn.fp32_precision = "bf16"
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        yield switches()
    torch.set_float32_matmul_precision(older)
    torch.backends.fp32_precision = before
    for switch, value in leaves:
        switch.fp32_precision = value


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_is_in_true_float32_and_leaves_the_switches(loose_switches, name):
    model = network()
    MEASUREMENTS[name](model)
    assert model[1].seen == {("ieee",) * len(_SWITCHES) + (False, False, False)}
    assert switches() == loose_switches
    assert torch.is_autocast_enabled("cpu")
    assert all(module.training for module in model.modules())


def test_relevance_is_in_true_float32(loose_switches):
    model, seen = network(), set()
    forward = Watch.forward

    def note(self, x):
        x = forward(self, x)
        seen.update(self.seen)
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "forward", note)
        filter_responses(model, [(X, LABELS)], 2, ["relevance"])
    assert seen == {("ieee",) * len(_SWITCHES) + (False, False, False)}
    assert switches() == loose_switches


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_training_computes_as_its_precision_says_and_leaves_the_switches(loose_switches, precision):
    model = network()
    config = TrainingConfig(epochs=1, batch_size=3, padding=0, precision=precision)
    fit(model, batches(), config, generator=torch.Generator(), resume=TrainingState())
    wanted = ("tf32" if precision == "tf32" else "ieee",) * len(_SWITCHES)
    forward = (*wanted, precision == "bfloat16", False, True)
    backward = (*wanted, False, False, True)
    assert model[1].seen == {forward, backward}
    assert switches() == loose_switches


SETTERS = [
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cudnn.allow_tf32 = False",
]


def test_switches_are_as_they_were_also_for_what_is_set_later(tmp_path):
    """Whatever was set, older switches or newer; a switch that was not set still is not."""
    from multiprocessing import get_context

    with get_context("spawn").Pool(1, maxtasksperchild=None) as pool:
        jobs = list(itertools.permutations(SETTERS, 2))
        assert jobs
        assert all(pool.map(_keeps_switches, jobs))


def _keeps_switches(setters):
    """Compare in children, since a switch that was set can never be unset."""
    import os
    import pickle

    found = []
    for precision in (None, "ieee", "tf32"):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            for setter in setters:
                exec(setter)
            if precision:
                with float32_as(precision):
                    assert switches() == [precision] * len(_SWITCHES)
            now = [switches()]
            for later in ("ieee", "tf32", "none"):
                torch.backends.fp32_precision = later
                now.append(switches())
            os.write(write, pickle.dumps(now))
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as end:
            found.append(end.read())
        os.waitpid(child, 0)
    return found[0] != b"" and found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", [n for n in MEASUREMENTS if n != "fisher"])
def test_inference_mode_is_refused(name):
    with torch.inference_mode(), pytest.raises(ValueError, match="inference"):
        MEASUREMENTS[name](network())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_short_numbers_are_refused(dtype):
    with pytest.raises(ValueError, match=r"model\.float\(\)"):
        fullgrad(network().to(dtype), X.to(dtype), LABELS)


def test_torchscript_is_refused():
    model = torch.jit.trace(network().eval(), X)
    with pytest.raises(ValueError, match="TorchScript"):
        fullgrad(model, X, LABELS)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_compiled_network_gives_what_the_plain_one_gives(name):
    if name in ("fisher", "drift"):
        pytest.skip("reads the network by its own names")
    plain = network(nn.Identity).eval()
    compiled = torch.compile(network(nn.Identity).eval(), backend="eager")
    compiled(X), compiled(X.clone().requires_grad_())
    job = MEASUREMENTS[name]
    if name == "pictures":
        found = visualize_filters(compiled, "_orig_mod.4", start=X[0], steps=2)
    else:
        found = job(compiled)
    torch.manual_seed(0)
    expected = job(plain)
    assert _flat(found) == pytest.approx(_flat(expected), rel=1e-5)


def _flat(result):
    if isinstance(result, dict):
        return [value for part in result.values() for value in _flat(part)]
    for part in ("maps", "norms"):
        result = getattr(result, part, result)
    if isinstance(result, torch.Tensor):
        return result.flatten().tolist()
    return [getattr(result, "overall", len(result) if hasattr(result, "__len__") else result)]


@pytest.mark.gpu
def test_fullgrad_is_complete_with_pytorchs_defaults():
    model = network().cuda()
    assert completeness_error(model, X.cuda(), LABELS.cuda()).max() < 1e-4
    right = fullgrad(network().double(), X.double(), LABELS)
    torch.testing.assert_close(
        fullgrad(model, X.cuda(), LABELS.cuda()).cpu().double(), right, rtol=1e-3, atol=1e-3
    )


@pytest.mark.gpu
def test_measuring_on_a_gpu_is_true_float32():
    a, b = (torch.randn(512, 512, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    exact, error = a.double() @ b.double(), {}
    torch.set_float32_matmul_precision("high")
    for precision in ("ieee", "tf32"):
        with float32_as(precision):
            error[precision] = ((a.cuda() @ b.cuda()).cpu() - exact).abs().max().item()
    with measuring(nn.Identity()):
        assert ((a.cuda() @ b.cuda()).cpu() - exact).abs().max().item() < 1e-3
    torch.set_float32_matmul_precision("highest")
    assert error["ieee"] < 1e-3 < error["tf32"]
