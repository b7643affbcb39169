"""The benchmark compares like with like: the plain code gives the library's numbers."""

import json

import pytest
import torch

from benchmarks import jobs, measure, plain
from permafrost.explain import conv_layers, fullgrad, visualize_filters
from permafrost.freezing import frozen_filters
from permafrost.models import build_network
from permafrost.ranking import METRICS, evaluate_metric
from permafrost.strategies.fisher import fisher_diagonal

CPU = torch.device("cpu")


@pytest.fixture
def small():
    """Return a builder of equal small classifiers, in float64."""

    def build():
        network = build_network("vgg11", width=0.1, batch_norm=True, classes=[10], seed=0)
        return network.view("shared", 0, 1).double()

    return build


def test_a_masked_step_is_a_frozen_step(small):
    batch = jobs.random_batch(CPU, 6)
    images, ours, theirs = batch.images.double(), small(), small()
    masks = jobs.random_masks(ours, 0.5)
    step = plain.training_step(theirs, masks)
    with frozen_filters(ours, masks, batch_norm="none"):
        optimizer = torch.optim.SGD(ours.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(3):
            ours.train()
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(ours(images), batch.labels)
            loss.backward()
            optimizer.step()
            assert step(images, batch.labels) == pytest.approx(loss.item(), abs=1e-10)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-10)


def test_fisher_information_image_by_image(small):
    batch, model = jobs.random_batch(CPU, 3), small().eval()
    images = batch.images.double()
    names = [name for name, _ in model.named_parameters()]
    found = fisher_diagonal(model, [(images, batch.labels)], names)
    one_by_one = [plain.fisher_diagonal(model, image) for image in images]
    for name in names:
        mean = sum(each[name] for each in one_by_one) / 3
        torch.testing.assert_close(found[name], mean, rtol=1e-8, atol=1e-14)


def test_fullgrad_image_by_image(small):
    batch, model = jobs.random_batch(CPU, 3), small().eval()
    images = batch.images.double()
    maps = fullgrad(model, images, batch.labels)
    one_by_one = [
        plain.fullgrad(model, *pair) for pair in zip(images, batch.labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(maps, torch.stack(one_by_one), rtol=0, atol=1e-10)


def test_filters_one_by_one(small):
    model, start = small().eval(), jobs.random_batch(CPU, 1).images[0].double()
    name = list(conv_layers(model))[4]
    pictures = visualize_filters(model, name, [0, 3, 1], start=start, steps=4)
    layer = model.get_submodule(name)
    one_by_one = [plain.visualize_filter(model, layer, f, start, 4) for f in (0, 3, 1)]
    torch.testing.assert_close(pictures, torch.stack(one_by_one), rtol=0, atol=1e-10)


def test_metrics_pair_by_pair():
    generator = torch.Generator().manual_seed(0)
    filters, classes = torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    for name, metric in plain.pair_metrics().items():
        found = [[metric(f, c) for c in classes] for f in filters]
        scores = evaluate_metric(METRICS[name], filters, classes).double()
        # torchmetrics pads the maps for SSIM, so that it sees more windows.
        tolerance = 0.1 if name == "ssim" else 1e-5
        torch.testing.assert_close(scores, torch.tensor(found).double(), rtol=0, atol=tolerance)


def test_rows_hold_ratios_and_floors(tmp_path):
    calls = []
    done = measure.measure(
        [measure.Job("a", lambda: calls.append("ours"), lambda: calls.append("theirs"))], 3, least=0
    )
    assert calls == ["ours", "theirs", "theirs", "ours"] * 2  # they take turns; one round to warm
    assert [len(done[0].ours), len(done[0].theirs)] == [3, 3]
    job = measure.Job("b", lambda: None, operations=5e9, target="2x")
    result = measure.Result(job, [10.0, 20.0, 30.0], [30.0, 20.0, 60.0])
    row = result.row({"float32": 1e12}, "this")
    assert (row["ours_ms"], row["theirs_ms"], row["ratio"]) == (20, 30, 2)
    assert (row["ratio_min"], row["ratio_max"]) == (1, 3)
    assert (row["floor_ms"], row["floor_share"]) == (5, 0.25)
    measure.write([row], tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    assert "| b | float32 | 20 | 30 | 2x (1–3) | 2x | 5 | 25% |" in measure.table([row])


def test_a_whole_adds_up_its_parts():
    part = measure.Result(measure.Job("p", lambda: None, operations=10), [1.0, 2.0], [3.0, 5.0])
    other = measure.Result(measure.Job("q", lambda: None, operations=1), [10.0, 10.0], [0.0, 0.0])
    whole = jobs.whole("w", [(2, part), (1, other)], "2x")
    assert (whole.ours, whole.theirs, whole.job.operations) == ([12, 14], [6, 10], 21)
