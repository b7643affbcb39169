"""Map metrics against SciPy and scikit-image; constants, directions, user metrics."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from scipy.spatial.distance import cosine, jensenshannon
from scipy.stats import pearsonr, spearmanr
from skimage.metrics import mean_squared_error, structural_similarity

from permafrost.errors import InputError
from permafrost.ranking import METRICS, evaluate_metric, get_metric, map_metric, map_metrics

ALL = list(METRICS)
BEST = {"mse": 0, "pearson": 1, "cosine": 1, "spearman": 1, "ssim": 1, "sim": 1, "js": 0}


def random_maps(n, side=(17, 14), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *side, generator=generator) * 3 + 2


def tied_maps(n, seed=0):
    """Few distinct values, so most positions tie."""
    return random_maps(n, seed=seed).round().clamp(0, 4)


def rescale(a):
    return (a - a.min()) / (a.max() - a.min())


def assert_near(actual, expected, atol=1e-6):
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=1e-6, atol=atol)


def naive_ssim(a, b, side):
    """SSIM position by position from its definition, over the windows that lie inside."""
    offsets = np.arange(side) - side // 2
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    r = side // 2
    inside = (slice(r, a.shape[0] - r), slice(r, a.shape[1] - r))

    def local(x):
        return correlate(x, window)[inside]

    ma, mb = local(a), local(b)
    va, vb, cov = local(a * a) - ma**2, local(b * b) - mb**2, local(a * b) - ma * mb
    num = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
    return (num / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()


def peer_ssim(a, b):
    return structural_similarity(
        rescale(a),
        rescale(b),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
    )


def distribution(a):
    return rescale(a).ravel() / rescale(a).sum()


PEERS = {
    "mse": lambda a, b: mean_squared_error(rescale(a), rescale(b)),
    "pearson": lambda a, b: pearsonr(a.ravel(), b.ravel()).statistic,
    "cosine": lambda a, b: 1 - cosine(rescale(a).ravel(), rescale(b).ravel()),
    "spearman": lambda a, b: spearmanr(a.ravel(), b.ravel()).statistic,
    "ssim": peer_ssim,
    "sim": lambda a, b: np.minimum(distribution(a), distribution(b)).sum(),
    "js": lambda a, b: jensenshannon(distribution(a), distribution(b)) ** 2,
}


@pytest.mark.parametrize("make", [random_maps, tied_maps])
@pytest.mark.parametrize("name", ALL)
def test_equals_the_peer_on_every_pair(name, make):
    filters, classes = make(5, seed=1), make(3, seed=2)
    scores = METRICS[name](filters, classes)
    expected = [
        [PEERS[name](f, c) for c in classes.double().numpy()] for f in filters.double().numpy()
    ]
    assert scores.shape == (5, 3)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "side"), [((11, 30), 11), ((10, 30), 9), ((4, 5), 3), ((2, 2), 1)]
)
def test_ssim_takes_the_largest_odd_window_that_fits(shape, side):
    filters, classes = random_maps(2, shape, seed=1), random_maps(2, shape, seed=2)
    expected = [
        [naive_ssim(rescale(f), rescale(c), side) for c in classes.double().numpy()]
        for f in filters.double().numpy()
    ]
    np.testing.assert_allclose(map_metrics.ssim(filters, classes), expected, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_identical_maps_score_best(name):
    maps = random_maps(6)
    scores = METRICS[name](maps, maps)
    best = scores.argmax(0) if METRICS[name].higher_is_better else scores.argmin(0)
    assert best.tolist() == list(range(6))
    assert_near(scores.diagonal(), torch.full((6,), float(BEST[name])))
    others = scores[~torch.eye(6, dtype=torch.bool)]
    assert ((others - BEST[name]).abs() > 1e-3).all()


def test_equal_maps_have_no_distance_at_all():
    maps = random_maps(4)
    assert (map_metrics.mse(maps, maps).diagonal() == 0).all()
    assert (map_metrics.sim(maps, maps).diagonal() == 1).all()


CONSTANT_BOTH = {**BEST, "pearson": 0, "cosine": 0, "spearman": 0}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [0.0, 1.0, -7.3])
def test_constant_maps_have_the_documented_score(name, value):
    constant = torch.full((1, 17, 14), value)
    varied = random_maps(1)
    metric = METRICS[name]
    rescaled = rescale(varied[0].double().numpy())
    share = rescaled / rescaled.sum()
    zeros, uniform = np.zeros_like(rescaled), np.full_like(rescaled, 1 / rescaled.size)
    with_varied = {
        "mse": (rescaled**2).mean(),
        "pearson": 0,
        "cosine": 0,
        "spearman": 0,
        "ssim": naive_ssim(rescaled, zeros, 11),
        "sim": np.minimum(share, uniform).sum(),
        "js": jensenshannon(share.ravel(), uniform.ravel()) ** 2,
    }[name]
    assert metric(constant, constant).item() == pytest.approx(CONSTANT_BOTH[name], abs=1e-7)
    assert metric(constant, varied).item() == pytest.approx(with_varied, abs=1e-6)
    assert metric(varied, constant).item() == pytest.approx(with_varied, abs=1e-6)


def test_disjoint_maps_have_the_documented_bounds():
    halves = torch.zeros(2, 4, 4)
    halves[0, :2] = 1
    halves[1, 2:] = 1
    assert map_metrics.js(halves[:1], halves[1:]).item() == pytest.approx(math.log(2))
    assert map_metrics.sim(halves[:1], halves[1:]).item() == 0
    assert map_metrics.mse(halves[:1], halves[1:]).item() == 1
    assert map_metrics.pearson(halves[:1], halves[1:]).item() == -1
    assert map_metrics.cosine(halves[:1], halves[1:]).item() == 0


@pytest.mark.parametrize("name", ALL)
def test_scale_and_offset_of_a_map_do_not_count(name):
    filters, classes = random_maps(4, seed=1).double(), random_maps(3, seed=2).double()
    scale = torch.tensor([1e-200, 0.5, 1.0, 1e6], dtype=torch.float64)[:, None, None]
    moved = (filters + torch.tensor([0.0, 3.0, -9.0, 0.5])[:, None, None]) * scale
    assert_near(METRICS[name](filters, classes), METRICS[name](moved, classes))


def test_spearman_ignores_a_monotone_change():
    filters, classes = random_maps(4, seed=1).double(), random_maps(3, seed=2)
    assert torch.equal(
        map_metrics.spearman(filters, classes), map_metrics.spearman(filters.exp(), classes)
    )


@pytest.mark.parametrize("name", ALL)
def test_all_metrics_are_symmetric(name):
    filters, classes = random_maps(4, seed=1), random_maps(3, seed=2)
    assert_near(METRICS[name](filters, classes), METRICS[name](classes, filters).T)


@pytest.mark.parametrize("name", ALL)
def test_chunked_equals_whole(name, monkeypatch):
    filters, classes = random_maps(7, seed=1), random_maps(3, seed=2)
    whole = METRICS[name](filters, classes)
    pieces = torch.cat([METRICS[name](part, classes) for part in filters.split(2)])
    monkeypatch.setattr(map_metrics, "_CHUNK_ELEMENTS", 3000)
    assert_near(METRICS[name](filters, classes), whole, atol=1e-7)
    assert_near(pieces, whole, atol=1e-7)


def test_chunks_cover_everything_once_and_respect_the_budget(monkeypatch):
    monkeypatch.setattr(map_metrics, "_CHUNK_ELEMENTS", 100)
    parts = map_metrics._chunks(23, 20)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(23))
    assert max(part.stop - part.start for part in parts) == 5
    assert len(map_metrics._chunks(3, 1000)) == 3


@pytest.mark.parametrize("name", ALL)
def test_equal_filters_tie_exactly(name):
    filters = random_maps(1, seed=1).expand(37, -1, -1)
    scores = METRICS[name](filters, random_maps(5, seed=2))
    assert (scores == scores[:1]).all()


@pytest.mark.parametrize("name", ALL)
def test_arguments_are_left_alone_and_strides_do_not_matter(name):
    filters, classes = random_maps(4, seed=1).double(), random_maps(3, seed=2).double()
    before = filters.clone(), classes.clone()
    scores = METRICS[name](filters, classes)
    assert torch.equal(filters, before[0])
    assert torch.equal(classes, before[1])
    strided = filters.mT.contiguous().mT
    assert_near(METRICS[name](strided, classes), scores)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_score_as_in_float64(name, dtype):
    filters, classes = random_maps(4, seed=1).to(dtype), random_maps(3, seed=2).to(dtype)
    scores = METRICS[name](filters, classes)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, METRICS[name](filters.double(), classes.double()))


@pytest.mark.parametrize("name", ALL)
def test_maps_may_require_a_gradient(name):
    filters, classes = random_maps(4, seed=1), random_maps(3, seed=2)
    scores = METRICS[name](filters.clone().requires_grad_(), classes)
    assert torch.equal(scores.detach(), METRICS[name](filters, classes))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_maps_that_are_not_finite_are_refused(name, value):
    good, bad = random_maps(2), random_maps(2)
    bad[1, 3, 3] = value
    with pytest.raises(ValueError, match="filter_maps hold values that are not finite"):
        METRICS[name](bad, good)
    with pytest.raises(ValueError, match="class_maps hold values that are not finite"):
        METRICS[name](good, bad)


@pytest.mark.parametrize("name", ALL)
def test_maps_of_unlike_shapes_are_refused(name):
    with pytest.raises(ValueError, match=r"filter_maps are \(4, 6\), but class_maps \(6, 4\)"):
        METRICS[name](torch.rand(2, 4, 6), torch.rand(2, 6, 4))
    with pytest.raises(ValueError, match=r"class_maps have shape \(6, 4\)"):
        METRICS[name](torch.rand(2, 6, 4), torch.rand(6, 4))
    with pytest.raises(ValueError, match=r"filter_maps have shape \(0, 6, 4\)"):
        METRICS[name](torch.rand(0, 6, 4), torch.rand(1, 6, 4))


@pytest.mark.parametrize("name", ALL)
def test_get_metric_returns_the_built_in(name):
    assert get_metric(name) is METRICS[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mze", "criterion 'mze' is unknown: use one of .*mse, pearson, .*js"),
        ("taylor", "criterion 'taylor' is no map metric"),
    ],
)
def test_names_that_are_no_metrics(name, message):
    with pytest.raises(InputError, match=message):
        get_metric(name)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(3, 2), r"metric 'own' returned shape \(3, 2\), not \(2, 3\)"),
        (torch.zeros(2), r"metric 'own' returned shape \(2,\)"),
        (torch.full((2, 3), math.nan), "metric 'own' returned numbers that are not finite"),
        (torch.full((2, 3), math.inf), "metric 'own' returned numbers that are not finite"),
        (torch.zeros(2, 3, dtype=torch.int64), "metric 'own' returned torch.int64"),
        (np.zeros((2, 3)), "metric 'own' returned ndarray, not a Tensor"),
    ],
)
def test_unusable_results_name_the_metric(result, message):
    @map_metric(higher_is_better=True)
    def own(filter_maps, class_maps):
        return result

    with pytest.raises(InputError, match=message):
        evaluate_metric(own, torch.rand(2, 4, 4), torch.rand(3, 4, 4))


def test_evaluate_metric_keeps_no_gradient_and_refuses_bad_maps():
    maps = random_maps(2).requires_grad_()
    assert not evaluate_metric(METRICS["mse"], maps, maps).requires_grad
    with pytest.raises(ValueError, match="not finite"):
        evaluate_metric(METRICS["mse"], maps * math.nan, maps)
