"""Claims held against rows that were made by hand."""

from itertools import product

import numpy as np
import pytest

from permafrost.claims import Claim, all_claims, claims_table, held_against
from permafrost.evaluation.comparisons import holm

SEEDS = range(5)


def row(strategy, seed, kept, learned, metric=None, pct=None, twin=None, **hyper):
    return {
        "strategy": strategy,
        "seed": seed,
        "metric": metric,
        "pct": pct,
        "twin": twin,
        "hyper": hyper,
        "status": "done",
        "R": [[0.1, 0.1], [0.5, 0.1], [kept, learned]],
        "acc_mean": (kept + learned) / 2,
    }


def noise(seed):
    return (0.00, 0.01, -0.01, 0.02, -0.02)[seed]


@pytest.fixture
def rows():
    """Fine-tuning, rows by two criteria and by chance, LwM with a twin, joint training."""
    made = []
    for seed in SEEDS:
        n = noise(seed)
        made += [
            row("finetune", seed, 0.30, 0.60),
            row("freeze", seed, 0.40 + n, 0.50, "mse", 0.25),
            row("freeze", seed, 0.50 + n, 0.40, "mse", 0.75),
            row("freeze", seed, 0.35, 0.50, "random", 0.25),
            row("freeze", seed, 0.45, 0.40, "random", 0.75),
            row("freeze", seed, 0.40, 0.50, "pearson", 0.25),
            row("lwf", seed, 0.48, 0.58),
            row("lwm", seed, 0.50 + n / 10, 0.60, attention=1),
            row("lwm", seed, 0.50 + n, 0.60 - n, twin="chance", attention=1),
            row("joint", seed, 0.6, 0.6, passes=1),
            row("joint", seed, 0.7, 0.7, passes=2),
        ]
    return made


def outcomes(rows):
    return {each.claim.text: each for each in held_against(rows, all_claims(rows))}


def test_what_can_be_said_is_said(rows):
    assert [*outcomes(rows)] == [
        "the more is frozen, the more is kept",
        "the more is frozen, the less is learned",
        "filters ranked by MSE keep more than those ranked by Pearson",
        "LwM is better than LwF",
        "one task after the other with frozen filters is better than joint training",
        "filters ranked by mse keep more than filters drawn by chance",
        "filters ranked by pearson keep more than filters drawn by chance",
        "lwm is better than its twin by chance",
    ]
    assert all_claims([row("finetune", 0, 0.3, 0.6)]) == []


def test_differences_by_hand(rows):
    found = outcomes(rows)

    def mean(text):
        return found[text].difference.mean

    assert mean("the more is frozen, the more is kept") == pytest.approx(0.10)
    assert mean("the more is frozen, the less is learned") == pytest.approx(0.10)
    # At a quarter, which both have.
    assert mean("filters ranked by MSE keep more than those ranked by Pearson") == pytest.approx(0)
    assert mean("LwM is better than LwF") == pytest.approx(0.02)
    assert mean(
        "one task after the other with frozen filters is better than joint training"
    ) == pytest.approx(0.45 - 0.7)
    chance = "filters ranked by mse keep more than filters drawn by chance"
    assert mean(chance) == pytest.approx(0.05)
    assert found[chance].difference.seeds == 5


def test_verdicts(rows):
    found = outcomes(rows)
    assert found["LwM is better than LwF"].verdict == "holds"
    assert found["lwm is better than its twin by chance"].verdict == "undecided"
    assert (
        found["filters ranked by MSE keep more than those ranked by Pearson"].verdict == "undecided"
    )
    # Without any spread there is no test, and nothing is decided.
    assert found["the more is frozen, the more is kept"].verdict == "undecided"
    reverse = Claim("", "", {"strategy": "lwf"}, {"strategy": "lwm", "twin": None})
    assert held_against(rows, [reverse])[0].verdict == "does not hold"


def test_p_is_adjusted_for_the_claims_tested_together(rows):
    every = held_against(rows, all_claims(rows))
    known = [each for each in every if each.p_adjusted is not None]
    assert [each.p_adjusted for each in known] == holm([each.difference.p for each in known])
    (alone,) = held_against(rows, [every[3].claim])
    assert alone.p_adjusted < every[3].p_adjusted


def test_equal_learning_interpolates_between_shares_and_counts_what_does_not_overlap(rows):
    claim = Claim(
        "",
        "",
        {"strategy": "lwf"},
        {"strategy": "freeze", "metric": "random"},
        "kept at equal learning",
    )
    (found,) = held_against(rows, [claim])
    # A fifth of the way from fine-tuning to a quarter; LwF has no trade-off of its own.
    assert found.difference.mean == pytest.approx(0.48 - 0.31)
    more = [each | {"R": [*each["R"][:2], [0.9, 0.7]]} if each["strategy"] == "lwf" else each
            for each in rows]  # fmt: skip
    (found,) = held_against(more, [claim])
    assert found.difference is None
    assert found.without_overlap == tuple(SEEDS)
    assert found.verdict == "undecided"


def test_several_draws_count_as_their_mean(rows):
    more = [row("freeze", seed, 0.45, 0.50, "random", 0.25) for seed in SEEDS]
    claim = Claim("", "", {"strategy": "freeze", "metric": "mse"},
                  {"strategy": "freeze", "metric": "random"}, "kept")  # fmt: skip
    (alone,), (both,) = held_against(rows, [claim]), held_against([*rows, *more], [claim])
    assert alone.difference.mean == pytest.approx(0.05)
    assert both.difference.mean == pytest.approx((0.05 + 0.0) / 2)


def test_failed_runs_do_not_count(rows):
    broken = [
        {"status": "failed", "error": "", **{k: each[k] for k in ("strategy", "seed", "metric",
         "pct", "twin", "hyper")}} if each["seed"] == 0 and each["strategy"] == "lwm" else each
        for each in rows
    ]  # fmt: skip
    assert outcomes(broken)["LwM is better than LwF"].difference.seeds == 4


def test_the_table_shows_every_claim(rows):
    table = claims_table(held_against(rows, all_claims(rows)))
    lines = table.splitlines()
    assert len(lines) == 2 + 8
    assert "| Dhar et al. 2019 | LwM is better than LwF | mean | +2.0" in table
    assert lines[2].startswith("| Feenstra &amp; Dow 2023 | the more is frozen")


def test_of_one_share_nothing_is_said_about_more(rows):
    single = [each for each in rows if each["pct"] != 0.75]
    assert "the more is frozen, the more is kept" not in outcomes(single)


def test_a_share_of_zero_is_fine_tuning(rows):
    more = [row("freeze", seed, 0.3, 0.6, "random", 0.0) for seed in SEEDS]
    chance = "filters ranked by mse keep more than filters drawn by chance"
    assert outcomes([*rows, *more])[chance].difference.mean == pytest.approx(0.05)


@pytest.mark.parametrize("shares", [(0.25, 0.5, 0.75), (0.75,)])
def test_two_rankings_that_are_the_same_do_not_differ_at_equal_learning(shares):
    """Whatever the noise in what they learn: held one way alone, the left would look better."""
    draw = np.random.default_rng(0)
    claim = Claim("", "", {"strategy": "freeze", "metric": "mse"},
                  {"strategy": "freeze", "metric": "random"}, "kept at equal learning")  # fmt: skip
    means = []
    for _ in range(100):
        made = []
        for seed in range(5):
            made.append(row("finetune", seed, 0.3, 0.6 + 0.02 * draw.standard_normal()))
            for metric, pct in product(("mse", "random"), shares):
                kept = 0.3 + 0.2 * pct + 0.005 * draw.standard_normal()
                learned = 0.6 - 0.2 * pct + 0.02 * draw.standard_normal()
                made.append(row("freeze", seed, kept, learned, metric, pct))
        (found,) = held_against(made, [claim])
        means.append(found.difference.mean)
    error = np.std(means, ddof=1) / len(means) ** 0.5
    assert abs(np.mean(means)) < 3 * error
