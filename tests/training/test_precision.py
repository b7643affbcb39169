"""Precision: bfloat16 training freezes and resumes as float32's does, and runs are keyed by it."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from permafrost import check
from permafrost.data import Batches
from permafrost.errors import InputError
from permafrost.experiment import RunInputs, new_network, train_first_task, train_run
from permafrost.freezing import batch_norm_after, frozen_filters, functions
from permafrost.machine import machine_identity
from permafrost.params import Params
from permafrost.runs.spec import RunSpec
from permafrost.strategies.lwf import distillation
from permafrost.training import TrainingConfig, cross_entropy, fit, resolve_precision
from permafrost.training.precision import computing_in

CPU = torch.device("cpu")
CONFIG = TrainingConfig(epochs=2, lr=0.02, weight_decay=0.1, batch_size=4, precision="bfloat16")


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# Gradients


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (0, 2), (2, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (3, 2)])
def test_the_matrix_product_is_the_weight_gradient(kernel, padding, memory_format):
    inputs = random(3, 5, 4, 6).to(memory_format=memory_format)
    weight = random(4, 5, *kernel, seed=1)
    output = torch.conv2d(inputs, weight, padding=padding)
    gradient = random(*output.shape, seed=2).to(memory_format=memory_format)
    found = functions._weight_gradient(gradient, inputs, weight.shape[2:], list(padding))
    _, expected, _ = torch.ops.aten.convolution_backward(
        gradient, inputs, weight, [4], [1, 1], padding, [1, 1], False, [0, 0], 1,
        [False, True, False],
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "options", "short_cut"),
    [
        (4, {}, True),
        (8, {}, False),
        (4, {"padding": 0}, True),
        (8, {"stride": 2}, False),  # to a small map
        (4, {"padding": 2, "dilation": 2}, False),
        (4, {"bias": False}, True),
    ],
)
def test_bfloat16_gradients_are_close_to_float64s(monkeypatch, size, options, short_cut):
    """Within 2% of the largest value: the 8 bits of bfloat16 give 0.4% for each factor."""
    products, original = [], functions._weight_gradient
    monkeypatch.setattr(
        functions, "_weight_gradient", lambda *a: products.append(original(*a)) or products[-1]
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 6, 3, **({"padding": 1} | options)))
    frozen = torch.tensor([True, False, False, True, True, False])
    plain, inputs = copy.deepcopy(model).double(), random(8, 5, size, size).requires_grad_()
    factors = random(*plain(inputs).shape, seed=1)
    (plain(inputs) * factors).sum().backward()
    ours = inputs.detach().float().requires_grad_()
    with frozen_filters(model, {"0": frozen}):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(ours)
        assert output.dtype == torch.bfloat16
        (output * factors.float()).sum().backward()
        pairs = [(ours.grad, inputs.grad)]
        pairs.append((model[0].weight_rows.live.grad, plain[0].weight.grad[~frozen]))
        if model[0].bias_rows is not None:
            pairs.append((model[0].bias_rows.live.grad, plain[0].bias.grad[~frozen]))
    assert len(products) == short_cut
    for found, expected in pairs:
        assert found.dtype == torch.float32
        assert 0 < (found - expected).abs().max() < 2e-2 * expected.abs().max()


# Training


@pytest.fixture
def start(make_network):
    """Return a view of odd values, which bfloat16 would round."""
    view = make_network().view("shared", 0, 1)
    for index, value in enumerate(view.state_dict().values()):
        if value.is_floating_point():
            value.add_(random(*value.shape, seed=index).abs(), alpha=0.05)
    return view


@pytest.fixture
def learn(start, half_masks, make_sequence):
    """Return a function that trains with half of the filters frozen: the state, history, losses."""
    sequence = make_sequence()
    batches = Batches(sequence.tasks[0].train, sequence.normalization, CPU)

    def run(config, **options):
        losses, view = [], copy.deepcopy(start)

        def objective(model, batch):
            loss, logits, labels = cross_entropy(model, batch)
            assert loss.dtype == torch.float32
            losses.append(loss.item())
            return loss, logits, labels

        generator = torch.Generator().manual_seed(0)
        with frozen_filters(view, half_masks(view)):
            rows = fit(view, batches, config, generator=generator, objective=objective, **options)
            for parameter in view.parameters():
                assert parameter.dtype == parameter.grad.dtype == torch.float32
        return view.state_dict(), copy.deepcopy(rows), losses

    return run


def test_frozen_filters_keep_their_bits_in_bfloat16(start, learn, half_masks):
    before, (after, _, _), norms = start.state_dict(), learn(CONFIG), batch_norm_after(start)
    for conv, frozen in half_masks(start).items():
        names = [f"{layer}.{part}" for layer in (conv, norms[conv]) for part in ("weight", "bias")]
        for name in [*names, f"{norms[conv]}.running_mean", f"{norms[conv]}.running_var"]:
            assert after[name].dtype == torch.float32
            assert torch.equal(before[name][frozen], after[name][frozen]), name
            assert not torch.equal(before[name][~frozen], after[name][~frozen]), name


def test_bfloat16_is_repeatable_resumes_and_is_measured_in_float32(learn, same_bits):
    states, short = [], []
    weights, history, _ = learn(
        CONFIG,
        on_epoch=lambda state: states.append(copy.deepcopy(state)),
        measure=lambda: short.append(torch.is_autocast_enabled("cpu")) or {},
    )
    assert short == [False, False]
    for options, steps in (({}, 4), ({"resume": states[0]}, 2)):
        again, rows, losses = learn(CONFIG, **options)
        assert same_bits(weights, again)
        assert rows == history
        assert len(losses) == steps


def test_bfloat16_differs_from_float32_a_little(learn, same_bits):
    short, _, losses = learn(CONFIG)
    long, _, expected = learn(dataclasses.replace(CONFIG, precision="float32"))
    assert not same_bits(short, long)
    assert 0 < abs(losses[0] / expected[0] - 1) < 0.02


# What is asked for


def set_fast(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("amx", "avx512"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_auto_is_what_the_device_is_fast_at(monkeypatch, amx, avx512, gpu):
    set_fast(monkeypatch, amx, avx512)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
    for device, fast in (("cpu", amx or avx512), ("cuda", gpu)):
        expected = {"auto": "bfloat16" if fast else "float32"}
        for wanted in ("auto", "float32", "bfloat16"):
            found = resolve_precision(wanted, torch.device(device))
            assert found == expected.get(wanted, wanted)
    assert resolve_precision("tf32", torch.device("cuda")) == "tf32"


def test_tf32_is_refused_on_a_cpu(monkeypatch):
    with pytest.raises(InputError, match=r"^train\.precision: tf32 needs a GPU; allowed here: \w"):
        resolve_precision("tf32", CPU)
    with pytest.raises(ValueError, match=r"train\.precision: tf32 needs a GPU"):
        Params(train={"precision": "tf32"}, runtime={"device": "cpu"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(check, "load_checked", lambda path: Params(train={"precision": "tf32"}))
    monkeypatch.setattr(check, "_require_git", lambda root: None)
    with pytest.raises(InputError, match=r"^train\.precision: tf32 needs a GPU"):
        check.check_all()


@pytest.mark.gpu
def test_tf32_is_recorded_as_asked_for_on_a_gpu():
    device = torch.device("cuda")
    known = {wanted: machine_identity(device, wanted) for wanted in ("float32", "tf32")}
    assert known["tf32"]["precision"] == "tf32"
    assert known["tf32"] != known["float32"]


class Through:
    """Notes the request, trains at once and stores nothing."""

    def obtain(self, request, train, on_epoch):
        self.request = request
        return train(None, lambda progress: None).facts


@pytest.mark.parametrize("fast", [False, True])
def test_trainings_are_keyed_by_the_precision_that_they_use(monkeypatch, make_sequence, fast):
    set_fast(monkeypatch, fast, False)
    tasks, auto, found = make_sequence(), "bfloat16" if fast else "float32", {}
    for wanted in ("float32", "bfloat16", "auto"):
        params = Params(
            split={"classes_per_task": 2},
            model={"arch": "vgg11", "width": 0.05},
            train={"epochs": 1, "lr": 0.01, "batch_size": 4, "precision": wanted},
        )
        weights, spec = new_network(params, 0).state_dict(), RunSpec("finetune", 0, "shared")
        inputs, store, found[wanted] = RunInputs(tasks, "", weights, "", dict), Through(), []
        for train, arguments in (
            (train_first_task, (0, tasks, "")),
            (train_run, (spec, inputs, None)),
        ):
            record = train(store, params, *arguments, CPU)
            actual = auto if wanted == "auto" else wanted
            assert store.request.identity["machine"] == machine_identity(CPU, actual)
            assert store.request.params["precision"] == actual
            assert "auto" not in store.request.params.values()
            found[wanted] += [store.request.key, record["history"][0]["train_loss"]]
    assert machine_identity(CPU, "bfloat16")["precision"] == "bfloat16"
    assert found["auto"] == found[auto]
    assert len({*found["float32"], *found["bfloat16"]}) == 8


def test_distillation_is_not_rounded_to_short_numbers():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 8, generator=generator)
    short = torch.randn(6, 8, generator=generator).to(torch.bfloat16)
    with computing_in("bfloat16", CPU):
        loss = distillation(short.split(4, dim=1), teacher, 2.0)
    expected = distillation(short.double().split(4, dim=1), teacher.double(), 2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
