"""Paired differences, Holm's adjustment, trade-offs at equal learning."""

import pytest
from scipy import stats

from permafrost.evaluation.comparisons import (
    Point,
    TradeOff,
    holm,
    paired_difference,
)

LEFT = {10: 0.42, 11: 0.38, 12: 0.45, 13: 0.40}
RIGHT = {10: 0.40, 11: 0.39, 12: 0.41, 13: 0.37, 14: 0.99}


def test_a_paired_difference_is_scipys():
    found = paired_difference(LEFT, RIGHT)
    pairs = [LEFT[seed] for seed in LEFT], [RIGHT[seed] for seed in LEFT]
    test = stats.ttest_rel(*pairs)
    interval = test.confidence_interval(0.95)
    assert found.seeds == 4
    assert found.p == pytest.approx(test.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.mean == pytest.approx(0.02)
    assert found.effect == pytest.approx(test.statistic / 4**0.5, rel=1e-9)


def test_few_or_equal_differences_have_no_test():
    assert paired_difference({1: 0.5}, {2: 0.5}) is None
    single = paired_difference({1: 0.75}, {1: 0.5})
    assert (single.mean, single.low, single.p, single.seeds) == (0.25, None, None, 1)
    equal = paired_difference({1: 0.75, 2: 0.5}, {1: 0.5, 2: 0.25})
    assert (equal.low, equal.high, equal.p, equal.effect) == (0.25, 0.25, None, None)
    # Six right answers of 180 more in each seed: the floats differ in their last bits.
    answers = {0: 144, 1: 134, 2: 127}
    counted = [{seed: (n + more) / 180 for seed, n in answers.items()} for more in (6, 0)]
    rounded = paired_difference(*counted)
    assert (rounded.p, rounded.effect) == (None, None)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def points(*triples):
    return [Point(*triple) for triple in triples]


def test_a_trade_off_is_linear_between_shares():
    curve = TradeOff(points((0.0, 0.3, 0.5), (0.5, 0.4, 0.4), (1.0, 0.6, 0.2)))
    assert curve.kept_at(0.5) == pytest.approx(0.3)
    assert curve.kept_at(0.45) == pytest.approx(0.35)
    assert curve.kept_at(0.3) == pytest.approx(0.5)
    assert curve.kept_at(0.2) == pytest.approx(0.6)
    assert curve.kept_at(0.51) is None
    assert curve.kept_at(0.19) is None


def test_where_more_is_held_and_more_is_learned_both_count_as_one():
    curve = TradeOff(points((0.0, 0.3, 0.5), (0.25, 0.4, 0.3), (0.5, 0.5, 0.4), (0.75, 0.6, 0.1)))
    assert curve.kept_at(0.35) == pytest.approx(0.45)  # the two in the middle learn 0.35
    assert curve.kept_at(0.425) == pytest.approx(0.375)
    flat = TradeOff(points((0.0, 0.3, 0.4), (0.5, 0.5, 0.4)))
    assert flat.kept_at(0.4) == pytest.approx(0.4)
    assert flat.kept_at(0.3) is None


def test_a_trade_off_needs_two_shares():
    for few in (points((0.5, 0.4, 0.4)), points((0.5, 0.4, 0.4), (0.5, 0.3, 0.4))):
        with pytest.raises(ValueError, match="two shares"):
            TradeOff(few)
