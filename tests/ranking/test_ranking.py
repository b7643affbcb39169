"""Criteria and selection: scores per layer, orders with known answers, counts and masks."""

import doctest
import math

import pytest
import torch

import permafrost.ranking.criteria
from permafrost.errors import InputError
from permafrost.ranking import (
    AGGREGATES,
    CONTROLS,
    CRITERIA,
    METRICS,
    RESPONSES,
    Evidence,
    check_criterion,
    count_frozen,
    filters_of,
    frozen_mask,
    known_criteria,
    mask_of,
    order_filters,
    score_filters,
)

# Filters are rows, classes columns.
SCORES = torch.tensor(
    [
        [0.9, 0.8],
        [0.8, 0.9],
        [0.7, 0.1],
        [0.1, 0.7],
        [0.0, 0.2],
    ]
)


def make_evidence(sizes=(4, 6), seed=0):
    generator = torch.Generator().manual_seed(7)
    return Evidence(
        weights={f"conv{i}": torch.randn(f, 3, 3, 3) for i, f in enumerate(sizes)},
        filter_maps={
            f"conv{i}": torch.rand(f, 12, 12, generator=generator) for i, f in enumerate(sizes)
        },
        class_maps=torch.rand(3, 12, 12, generator=generator),
        seed=seed,
        gammas={f"conv{i}": torch.ones(f) for i, f in enumerate(sizes)},
        class_scores={
            name: {f"conv{i}": torch.ones(f, 3) for i, f in enumerate(sizes)} for name in RESPONSES
        },
    )


@pytest.mark.parametrize("module", [permafrost.ranking, permafrost.ranking.criteria])
def test_docstring_examples(module):
    # A criterion of an example is none of the package's.
    result = doctest.testmod(module, extraglobs={"__name__": "example"})
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", list(METRICS))
def test_map_scores_are_turned_so_that_higher_is_better(name):
    evidence = make_evidence()
    scores = score_filters(name, evidence)
    sign = 1 if METRICS[name].higher_is_better else -1
    assert list(scores) == ["conv0", "conv1"]
    for layer, values in scores.items():
        raw = METRICS[name](evidence.filter_maps[layer], evidence.class_maps)
        assert torch.equal(values, sign * raw)


@pytest.mark.parametrize("name", list(METRICS))
def test_the_class_map_itself_ranks_first(name):
    evidence = make_evidence()
    evidence.filter_maps["conv1"][4] = evidence.class_maps[0]
    assert order_filters(score_filters(name, evidence)["conv1"])[0] == 4


def test_layers_keep_the_order_of_the_weights():
    evidence = make_evidence()
    shuffled = Evidence(
        weights=evidence.weights,
        filter_maps=dict(reversed(evidence.filter_maps.items())),
        class_maps=evidence.class_maps,
    )
    assert list(score_filters("mse", shuffled)) == ["conv0", "conv1"]


def test_map_metrics_need_fitting_maps():
    evidence = make_evidence()
    with pytest.raises(ValueError, match="'mse' needs class maps"):
        score_filters("mse", Evidence(weights=evidence.weights, filter_maps=evidence.filter_maps))
    for maps in ({}, {"conv0": evidence.filter_maps["conv0"][:3]}):
        with pytest.raises(ValueError, match="'mse' needs 4 filter maps of 'conv0'"):
            score_filters("mse", Evidence(evidence.weights, maps, evidence.class_maps))


def test_random_is_seeded():
    first, again, other = (score_filters("random", make_evidence(seed=seed)) for seed in (3, 3, 4))
    for layer in first:
        assert first[layer].shape[1] == 1
        assert torch.equal(first[layer], again[layer])
        assert not torch.equal(first[layer], other[layer])
        assert ((first[layer] >= 0) & (first[layer] < 1)).all()


def test_random_layers_do_not_depend_on_each_other():
    small = score_filters("random", make_evidence((4, 32)))
    large = score_filters("random", make_evidence((64, 32, 5)))
    assert torch.equal(small["conv1"], large["conv1"])
    equal = score_filters("random", make_evidence((32, 32)))
    assert not torch.equal(equal["conv0"], equal["conv1"])


def test_random_leaves_the_global_generator_alone():
    evidence = make_evidence()
    before = torch.get_rng_state()
    score_filters("random", evidence)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def float64_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


INPUT = make_evidence()
EXPECTED = {criterion: score_filters(criterion, INPUT) for criterion in known_criteria()}


@pytest.mark.parametrize("criterion", EXPECTED)
def test_the_default_type_makes_no_difference(criterion, float64_by_default):
    for layer, scores in score_filters(criterion, INPUT).items():
        assert scores.dtype == torch.float32
        assert torch.equal(scores, EXPECTED[criterion][layer])


def test_random_is_uniform_over_the_filters():
    weights = {f"conv{i}": torch.empty(8, 1, 1, 1) for i in range(400)}
    scores = score_filters("random", Evidence(weights=weights, seed=1))
    firsts = torch.tensor([order_filters(s)[0] for s in scores.values()])
    # Expected 50 each with a standard deviation of 6.6.
    counts = torch.bincount(firsts, minlength=8)
    assert counts.min() > 25
    assert counts.max() < 75


def test_magnitude_is_the_mean_absolute_weight():
    weight = torch.nn.Parameter(
        torch.tensor([[1.0, -1.0], [3.0, 0.0], [-2.0, -2.0]]).view(3, 2, 1, 1)
    )
    scores = score_filters("magnitude", Evidence(weights={"conv": weight}))["conv"]
    assert torch.equal(scores, torch.tensor([[1.0], [1.5], [2.0]]))
    assert not scores.requires_grad


def test_known_criteria_are_all_usable():
    names = known_criteria()
    assert sorted(names) == sorted([*METRICS, *CONTROLS, *RESPONSES])
    assert list(METRICS) == ["mse", "pearson", "cosine", "spearman", "ssim", "sim", "js"]
    assert set(CONTROLS) == {"random", "magnitude", "bn_gamma"}
    assert set(RESPONSES) == {
        *("activation", "taylor", "taylor_signed", "fisher", "gradient", "attribution", "contrast"),
        *("conductance", "fullgrad_terms", "overlap", "ablation"),
        *("relevance", "relevance_normalized"),
    }
    evidence = make_evidence()
    for name in names:
        check_criterion(name)
        assert {k: len(v) for k, v in score_filters(name, evidence).items()} == {
            "conv0": 4,
            "conv1": 6,
        }


def test_a_criterion_is_at_home_where_it_is_defined():
    assert CRITERIA.home("mse") == "permafrost.ranking.map_metrics"
    assert CRITERIA.home("random") == "permafrost.ranking.weights"
    assert CRITERIA.home("taylor") == "permafrost.ranking.responses"
    assert CRITERIA.home("relevance") == "permafrost.ranking.relevance"


@pytest.mark.parametrize(
    "use",
    [check_criterion, lambda name: score_filters(name, Evidence({}))],
    ids=["check_criterion", "score_filters"],
)
def test_unknown_criteria(use):
    with pytest.raises(
        InputError, match=r"'magnitud' is unknown: .*mse.*taylor.*random, magnitude, .*, or mod"
    ):
        use("magnitud")
    with pytest.raises(InputError, match=r"criterion 'no_such_module:f'.*cannot be imported"):
        use("no_such_module:f")


@pytest.mark.parametrize(
    ("aggregate", "reverse", "expected"),
    [
        # Class 0 takes 0, class 1 takes 1, class 0 takes 2, class 1 takes 3.
        ("union", False, [0, 1, 2, 3, 4]),
        # Class 0's worst is 4, class 1's worst 2, class 0's next 3, class 1's next 0 (4, 3 taken).
        ("union", True, [4, 2, 3, 0, 1]),
        ("mean", False, [0, 1, 2, 3, 4]),
        ("mean", True, [4, 2, 3, 0, 1]),
        ("max", False, [0, 1, 2, 3, 4]),
        ("max", True, [4, 2, 3, 0, 1]),
    ],
)
def test_tied_hand_made_orders(aggregate, reverse, expected):
    assert order_filters(SCORES, aggregate, reverse).tolist() == expected


@pytest.mark.parametrize(
    ("aggregate", "reverse", "expected"),
    [
        # Class 0 ranks 3 2 1 0, class 1 ranks 3 0 1 2, class 2 ranks 0 3 2 1.
        # Turns: 0 takes 3; 1 takes 0 (3 is taken); 2 takes 2 (0 and 3 are); 0 takes 1.
        ("union", False, [3, 0, 2, 1]),
        # Worst: class 0 takes 0, class 1 takes 2, class 2 takes 1, class 0 takes 3.
        ("union", True, [0, 2, 1, 3]),
        # Means 6.67, 1.67, 2, 5; maxima 15, 3, 4, 5.
        ("mean", False, [0, 3, 2, 1]),
        ("mean", True, [1, 2, 3, 0]),
        ("max", False, [0, 3, 2, 1]),
        ("max", True, [1, 2, 3, 0]),
    ],
)
def test_hand_made_orders(aggregate, reverse, expected):
    scores = torch.tensor([[1.0, 4, 15], [2, 3, 0], [4, 1, 1], [5, 5, 5]])
    order = order_filters(scores, aggregate, reverse)
    assert order.tolist() == expected
    assert order.dtype == torch.int64


def test_mean_and_max_differ():
    scores = torch.tensor([[0.0, 9.0], [5.0, 5.0]])
    assert order_filters(scores, "max").tolist() == [0, 1]
    assert order_filters(scores, "mean").tolist() == [1, 0]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("reverse", [False, True])
def test_ties_go_to_the_lower_index(aggregate, reverse):
    classes = 1 if aggregate == "combined" else 3
    assert order_filters(torch.zeros(70, classes), aggregate, reverse).tolist() == list(range(70))
    scores = torch.tensor([[1.0], [2.0], [1.0], [2.0]])
    expected = [0, 2, 1, 3] if reverse else [1, 3, 0, 2]
    assert order_filters(scores, aggregate, reverse).tolist() == expected


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 5), (512, 50)])
def test_an_order_is_a_permutation_and_reverse_that_of_negated_scores(aggregate, shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if aggregate == "combined":
        scores = scores[:, :1]
    order = order_filters(scores, aggregate)
    assert sorted(order.tolist()) == list(range(shape[0]))
    if aggregate != "max":
        assert torch.equal(
            order_filters(scores, aggregate, reverse=True), order_filters(-scores, aggregate)
        )


def test_union_serves_every_class():
    scores = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    first = set(order_filters(scores)[:8].tolist())
    assert set(scores.argmax(0).tolist()) <= first


def test_default_is_union():
    scores = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order_filters(scores), order_filters(scores, "union", reverse=False))
    assert not torch.equal(order_filters(scores), order_filters(scores, "mean"))


def test_unusable_scores():
    with pytest.raises(InputError, match="aggregate 'median' is unknown: use one of union, mean, "):
        order_filters(SCORES, "median")
    for scores in (torch.zeros(3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="scores have shape"):
            order_filters(scores)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            order_filters(torch.tensor([[1.0], [value]]))


@pytest.mark.parametrize(
    ("pct", "filters", "count"),
    [
        (0.0, 64, 0),
        (1.0, 64, 64),
        (0.25, 64, 16),
        (0.25, 2, 1),
        (0.25, 10, 3),
        (0.5, 5, 3),
        (0.5, 7, 4),
        (0.145, 100, 15),
        (0.285, 100, 29),
        (1 - 0.9, 5, 1),
        (0.249, 2, 0),
        (0.1, 4, 0),
        (0.999, 64, 64),
        (0.99, 64, 63),
    ],
)
def test_count_rounds_half_up(pct, filters, count):
    assert count_frozen(pct, filters) == count


@pytest.mark.parametrize("pct", [-0.01, 1.01, 25, math.nan, math.inf])
def test_pct_outside_its_range(pct):
    with pytest.raises(ValueError, match="pct is"):
        count_frozen(pct, 64)
    with pytest.raises(ValueError, match="pct is"):
        frozen_mask(torch.arange(4), pct)


def test_mask_marks_the_first_of_the_order():
    order = torch.tensor([3, 0, 2, 1])
    assert frozen_mask(order, 0.5).tolist() == [True, False, False, True]
    assert frozen_mask(order, 0.25).tolist() == [False, False, False, True]
    assert frozen_mask(order, 0.0).tolist() == [False] * 4
    assert frozen_mask(order, 1.0).tolist() == [True] * 4
    assert frozen_mask(order, 0.0).dtype == torch.bool


def test_what_is_frozen_stays_so_and_the_first_of_the_rest_join():
    order = torch.tensor([3, 0, 2, 1, 4])
    before = torch.tensor([True, False, False, True, False])
    assert filters_of(frozen_mask(order, 0.0, before)) == [0, 3]
    assert filters_of(frozen_mask(order, 0.34, before)) == [0, 2, 3]
    assert filters_of(frozen_mask(order, 1.0, before)) == [0, 1, 2, 3, 4]
    assert filters_of(before) == [0, 3]
    all_frozen = torch.ones(5, dtype=torch.bool)
    assert filters_of(frozen_mask(order, 0.5, all_frozen)) == [0, 1, 2, 3, 4]


def test_a_mask_and_its_filters():
    assert filters_of(frozen_mask(torch.tensor([3, 0, 2, 1]), 0.5)) == [0, 3]
    for filters in ([], [0, 2], [0, 1, 2, 3]):
        mask = mask_of(filters, 4)
        assert (mask.dtype, len(mask), filters_of(mask)) == (torch.bool, 4, filters)
