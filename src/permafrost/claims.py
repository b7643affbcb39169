"""Claims: what the post, the papers and this project say, held against a comparison's rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from permafrost.evaluation.comparisons import (
    Difference,
    Point,
    TradeOff,
    holm,
    paired_difference,
)
from permafrost.tables import Row, groups, markdown

# What rows have in common: columns and their values; `hyper.NAME` is a hyperparameter, and `share`
# the "most" or "least" of the shares that are there.
Match = Mapping[str, Any]

KEPT, LEARNED, MEAN = "kept", "learned", "mean"
EQUAL = "kept at equal learning"
# A seed whose trade-offs do not overlap says nothing; with more of them than this a claim is open.
_MOST_WITHOUT_OVERLAP = 2


@dataclass(frozen=True)
class Claim:
    """That one method does better than another.

    Attributes
    ----------
    source : str
        Who says so.
    text : str
        What is said.
    left, right : Match
        The two methods; of several rows of a seed the mean counts, share by share.
    measure : {"kept", "learned", "mean", "kept at equal learning"}
        ``kept`` is the mean accuracy on the tasks before the last, ``learned`` that on the last,
        ``mean`` that of all. At equal learning each side's points are held against the other's
        trade-off, fine-tuning being its share of 0.
    """

    source: str
    text: str
    left: Match
    right: Match
    measure: str = MEAN


@dataclass(frozen=True)
class Tested:
    """A claim and what came out.

    Attributes
    ----------
    claim : Claim
        What was tested.
    difference : Difference or None
        Of left minus right, shares 0..1; None where no seed can be compared.
    p_adjusted : float or None
        By Holm's procedure over the claims tested together.
    without_overlap : tuple of int
        Seeds whose trade-offs do not overlap.
    """

    claim: Claim
    difference: Difference | None
    p_adjusted: float | None
    without_overlap: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """Return ``holds``, ``does not hold`` (the opposite does) or ``undecided``."""
        if self.difference is None or self.p_adjusted is None or self.p_adjusted >= 0.05:
            return "undecided"
        if len(self.without_overlap) > _MOST_WITHOUT_OVERLAP:
            return "undecided"
        return "holds" if self.difference.mean > 0 else "does not hold"


_MSE = {"strategy": "freeze", "metric": "mse"}
_POST = "Feenstra & Dow 2023"
CLAIMS = (
    Claim(_POST, "the more is frozen, the more is kept",
          {**_MSE, "share": "most"}, {**_MSE, "share": "least"}, KEPT),
    Claim(_POST, "the more is frozen, the less is learned",
          {**_MSE, "share": "least"}, {**_MSE, "share": "most"}, LEARNED),
    Claim(_POST, "filters ranked by MSE keep more than those ranked by Pearson",
          _MSE, {"strategy": "freeze", "metric": "pearson"}, KEPT),
    Claim("Dhar et al. 2019", "LwM is better than LwF",
          {"strategy": "lwm", "twin": None}, {"strategy": "lwf"}),
    Claim("Ebrahimi et al. 2021", "RRR is better than replay",
          {"strategy": "rrr", "twin": None}, {"strategy": "replay"}),
    Claim("Kang et al. 2022", "AFC is better than with equal weights",
          {"strategy": "afc", "twin": None}, {"strategy": "afc", "twin": "equal"}),
)  # fmt: skip


def all_claims(rows: Sequence[Row]) -> list[Claim]:
    """Return the claims that rows under one head can be held against.

    Those of the literature; of each criterion, that it keeps more than chance at equal learning; of
    each explained method, that it is better than its twins.
    """
    literature = [c for c in CLAIMS if _are_apart(rows, c)]
    return [*literature, *_against_joint(rows), *_of_criteria(rows), *_of_twins(rows, literature)]


def _are_apart(rows: Sequence[Row], claim: Claim) -> bool:
    """Return whether there are rows of both sides, and not the same."""
    left, right = (_matching(rows, match) for match in (claim.left, claim.right))
    return bool(left) and bool(right) and left != right


def _against_joint(rows: Sequence[Row]) -> list[Claim]:
    """Return the post's claim on joint training, for the sum of the tasks' epochs."""
    passes = [row["hyper"]["passes"] for row in _matching(rows, {"strategy": "joint"})]
    if not passes or not _some(rows, _MSE):
        return []
    text = "one task after the other with frozen filters is better than joint training"
    return [Claim(_POST, text, _MSE, {"strategy": "joint", "hyper.passes": max(passes)})]


def _of_criteria(rows: Sequence[Row]) -> list[Claim]:
    chance = {"strategy": "freeze", "metric": "random"}
    if not _some(rows, chance) or not _some(rows, _FINE_TUNING):
        return []
    metrics = dict.fromkeys(row["metric"] for row in _matching(rows, {"strategy": "freeze"}))
    return [
        Claim(
            _POST if metric == "mse" else "criterion",
            f"filters ranked by {metric} keep more than filters drawn by chance",
            {"strategy": "freeze", "metric": metric},
            chance,
            EQUAL,
        )
        for metric in metrics
        if metric != "random"
    ]


def _of_twins(rows: Sequence[Row], known: Sequence[Claim]) -> list[Claim]:
    twins = [group for group, _ in groups([r for r in rows if r.get("twin")], "strategy", "twin")]
    return [
        Claim(
            "explanation",
            f"{twin['strategy']} is better than its twin by {twin['twin']}",
            {"strategy": twin["strategy"], "twin": None},
            twin,
        )
        for twin in twins
        if all(claim.right != twin for claim in known)
    ]


_FINE_TUNING = {"strategy": "finetune"}


def held_against(rows: Sequence[Row], claims: Sequence[Claim]) -> list[Tested]:
    """Test claims on the rows of finished runs, adjusted for their number."""
    done = [row for row in rows if row["status"] == "done"]
    compared = [_compare(claim, done) for claim in claims]
    values = [None if found is None else found.p for found, _ in compared]
    known = [p for p in values if p is not None]
    adjusted = iter(holm(known))
    return [
        Tested(claim, found, None if p is None else next(adjusted), missing)
        for claim, (found, missing), p in zip(claims, compared, values, strict=True)
    ]


def claims_table(tested: Sequence[Tested]) -> str:
    """Return the table of tested claims, as Markdown."""
    lines = [
        [
            each.claim.source,
            each.claim.text,
            each.claim.measure,
            *_figures(each.difference),
            _p(each.p_adjusted),
            _seeds(each),
            each.verdict,
        ]
        for each in tested
    ]
    heads = ["who", "claim", "measured", "difference (95%)", "effect size", "p", "seeds", "verdict"]
    return markdown(heads, lines)


def _figures(found: Difference | None) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    text = f"{100 * found.mean:+z.2f}"
    if found.low is not None and found.high is not None:
        text += f" ({100 * found.low:+z.2f} to {100 * found.high:+z.2f})"
    return text, "–" if found.effect is None else f"{found.effect:+z.2f}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _seeds(each: Tested) -> str:
    count = each.difference.seeds if each.difference else 0
    apart = len(each.without_overlap)
    return f"{count} ({apart} without overlap)" if apart else str(count)


def _compare(claim: Claim, rows: Sequence[Row]) -> tuple[Difference | None, tuple[int, ...]]:
    """Return the difference that a claim is about, and the seeds without overlap."""
    left, right = (_by_seed(_matching(rows, match)) for match in (claim.left, claim.right))
    tuned = _by_seed(_matching(rows, _FINE_TUNING))
    values: dict[int, float] = {}
    missing = []
    for seed in left:
        if seed not in right:
            continue
        if claim.measure == EQUAL:
            found = _at_equal_learning(left[seed], right[seed], tuned.get(seed, []))
        else:
            found = _above(left[seed], right[seed], claim.measure)
        if found is None:
            missing.append(seed)
        else:
            values[seed] = found
    return paired_difference(values, dict.fromkeys(values, 0.0)), tuple(missing)


def _above(left: Sequence[Row], right: Sequence[Row], measure: str) -> float:
    """Return how far one seed's rows are above others; at the shares that both have, if any."""
    shares = {row["pct"] for row in left} & {row["pct"] for row in right}
    sides = []
    for side in (left, right):
        points = [
            getattr(_Measured.of(members), measure)
            for group, members in groups(side, "pct")
            if not shares or group["pct"] in shares
        ]
        sides.append(sum(points) / len(points))
    return sides[0] - sides[1]


def _at_equal_learning(
    left: Sequence[Row], right: Sequence[Row], tuned: Sequence[Row]
) -> float | None:
    """Return how much more one seed's left keeps than its right where both learn as much.

    The mean over the points of both sides, each held against the other side's trade-off: held one
    way alone, noise in what is learned would favour the left, since a point that learns too little
    has no counterpart, and one that learns too much has one that keeps less.
    """
    points = [_points(rows) for rows in (left, right)]
    start = _points(tuned)
    above = [
        sign * (point.kept - kept)
        for sign, mine, others in ((1, points[0], points[1]), (-1, points[1], points[0]))
        for point in mine
        if (kept := _kept_at([*start, *others], point.learned)) is not None
    ]
    return sum(above) / len(above) if above else None


def _points(rows: Sequence[Row]) -> list[Point]:
    # A share of 0 is fine-tuning, which is there already; a method without a share is a point.
    shared = [row | {"pct": row["pct"] or 0.0} for row in rows if row["pct"] != 0]
    return [
        Point(group["pct"], mean.kept, mean.learned)
        for group, members in groups(shared, "pct")
        for mean in [_Measured.of(members)]
    ]


def _kept_at(points: Sequence[Point], learned: float) -> float | None:
    """Return what a side keeps where it learns so much; a side of one share has no trade-off."""
    once = {point.share: point for point in points}
    return TradeOff(list(once.values())).kept_at(learned) if len(once) > 1 else None


@dataclass(frozen=True)
class _Measured:
    kept: float
    learned: float
    mean: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "_Measured":
        """Return the means over rows, such as several draws by chance."""
        ends = [kept_and_learned(row) | {"mean": row["acc_mean"]} for row in rows]
        return cls(**{name: sum(end[name] for end in ends) / len(ends) for name in ends[0]})


def kept_and_learned(row: Row) -> Row:
    """Return the mean accuracy on the tasks before the last, and that on the last."""
    *earlier, last = row["R"][-1]
    return {"kept": sum(earlier) / len(earlier), "learned": last}


def _by_seed(rows: Sequence[Row]) -> dict[int, list[Row]]:
    return {group["seed"]: members for group, members in groups(rows, "seed")}


def _some(rows: Sequence[Row], match: Match) -> bool:
    return bool(_matching(rows, match))


def _matching(rows: Sequence[Row], match: Match) -> list[Row]:
    plain = {name: value for name, value in match.items() if name != "share"}
    found = [row for row in rows if all(_column(row, n) == v for n, v in plain.items())]
    if "share" not in match or not found:
        return found
    choose = max if match["share"] == "most" else min
    wanted = choose(row["pct"] for row in found)
    return [row for row in found if row["pct"] == wanted]


def _column(row: Row, name: str) -> Any:
    group, _, hyper = name.partition(".")
    return row["hyper"].get(hyper) if group == "hyper" else row.get(name)
