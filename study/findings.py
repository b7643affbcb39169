"""`python -m study.findings`: hold the plan's claims against the confirming rows.

study/plan.yaml lists the claims, each under the piece that decides it; docs/results/plan.md says
why.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import yaml

from permafrost.artifacts import write_atomically
from permafrost.claims import Claim, Tested, claims_table, held_against, kept_and_learned
from permafrost.evaluation.comparisons import holm
from permafrost.strategies.packnet import PackNet
from permafrost.tables import Row, groups, markdown, measure, percent
from study.__main__ import PIECES, REPOSITORY, is_done, method, read_rows
from study.forest import draw_forest, of_explanations

RESULTS = REPOSITORY / "docs/results"
PLAN = Path(__file__).with_name("plan.yaml")
PICTURE = Path("docs/pictures/explanations.png")
_MEASURED = ("kept", "learned", "acc_mean", "acc_mean_without_task")


def main() -> None:
    """Write the claims and the tables."""
    if not PLAN.exists():
        sys.exit(f"{PLAN}: there is no plan yet")
    plan = yaml.safe_load(PLAN.read_text())
    tested = hold(plan["claims"])
    headed = {PIECES[piece]["about"]: members for piece, members in tested.items()}
    draw_forest(
        REPOSITORY / PICTURE,
        of_explanations(headed),
        "What an explanation adds: each method minus itself without the explanation",
    )
    write_atomically(RESULTS / "claims.md", claims(tested, plan["tag"]).encode())
    write_atomically(RESULTS / "tables.md", tables().encode())
    write_atomically(RESULTS / "drift.md", drift().encode())
    write_atomically(RESULTS / "stability.md", stability().encode())


def hold(plan: dict[str, list[dict[str, Any]]]) -> dict[str, list[Tested]]:
    """Test each piece's claims on its rows; p is adjusted for all of them together.

    A claim that cannot be decided counts among them; so it is where a seed is missing, since a run
    that fails is no reason to leave the seed out, and while a piece is not done.
    """
    tested = {
        piece: held_against(_rows(piece), [Claim(**claim) for claim in claims])
        for piece, claims in plan.items()
    }
    every = [each for piece in tested if is_done(piece) for each in tested[piece]]
    unknown = [e.claim.text for e in every if e.difference is None and not e.without_overlap]
    if unknown:
        sys.exit(f"no rows of both sides: {'; '.join(unknown)}")
    known = [
        _p(each, len(PIECES[piece]["seeds"])) for piece, mine in tested.items() for each in mine
    ]
    adjusted = holm([1.0 if p is None else p for p in known])
    decided = iter(None if p is None else a for p, a in zip(known, adjusted, strict=True))
    return {
        piece: [replace(each, p_adjusted=next(decided)) for each in members]
        for piece, members in tested.items()
    }


def _rows(piece: str) -> list[Row]:
    """Return the rows of a piece, if all of its seeds are done: nobody looks before."""
    return read_rows(piece) if is_done(piece) else []


def _p(each: Tested, seeds: int) -> float | None:
    """Return a claim's p, if all of its piece's seeds have an answer."""
    if each.difference is None or each.difference.seeds + len(each.without_overlap) < seeds:
        return None
    return each.difference.p


def claims(tested: dict[str, list[Tested]], tag: str) -> str:
    """Return the claims, piece by piece, as Markdown."""
    parts = [
        "# What holds",
        f"The plan is `docs/results/plan.md` at the tag `{tag}`, before the first of these rows "
        "was made. Differences in points of accuracy, paired by seed; p by the paired t test, "
        "adjusted by Holm's procedure over all claims of this page.",
        f"![What explanations add](../{PICTURE.relative_to('docs')})",
    ]
    for piece, members in tested.items():
        parts += [f"## {PIECES[piece]['about']}"]
        parts += [claims_table(members) if is_done(piece) else "Not done yet."]
        if failed := _failed(piece):
            parts += [f"Failed, which leaves what is claimed of them undecided: {failed}."]
    return "\n\n".join([*parts, ""])


def tables() -> str:
    """Return a table of all methods for each confirming piece, as Markdown."""
    parts = [
        "# All methods",
        "Test accuracy in percent, mean over the seeds with 95% intervals; memory besides the "
        "network while the last task is learned; seconds of a training on one core, which others "
        "shared: they compare the methods of one table, roughly.",
    ]
    for name, piece in PIECES.items():
        if "about" in piece and (rows := _rows(name)):
            parts += [f"## {piece['about']}", _table(rows)]
    if rows := _rows("confirm"):
        parts += [
            "## The fronts of frozen filters",
            "The area of kept and learned that fine-tuning and a criterion's three shares dominate "
            "(hypervolume with reference 0, 0), of 1.",
            fronts(rows),
        ]
    return "\n\n".join([*parts, ""])


def fronts(rows: Sequence[Row]) -> str:
    """Return the hypervolume of each criterion's front, all of as many points."""
    done = [row | kept_and_learned(row) for row in rows if row["status"] == "done"]
    tuned = [row for row in done if row["strategy"] == "finetune"]
    frozen = [row for row in done if row["strategy"] == "freeze"]
    lines = []
    for group, members in groups(frozen, "metric"):
        areas = []
        for of, mine in groups(members, "seed"):
            start = [row for row in tuned if row["seed"] == of["seed"]]
            ends = [end for _, end in groups([*start, *mine], "pct")]
            means = [[fmean(row[n] for row in end) for n in ("learned", "kept")] for end in ends]
            areas.append({"area": hypervolume([(learned, kept) for learned, kept in means])})
        lines.append([group["metric"], percent(measure(areas, "area"))])
    return markdown(["criterion", "hypervolume, percent"], lines)


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Return the area between the origin and the points that no other dominates."""
    area = best = 0.0
    for learned, kept in sorted(points, reverse=True):
        area += learned * max(0.0, kept - best)
        best = max(best, kept)
    return area


def drift() -> str:
    """Return for each confirming piece how drift and forgetting go together, as Markdown."""
    parts = [
        "# Drift and forgetting",
        "How far the first task's responses have moved at the end, relative to their size, and "
        "how it goes together with forgetting: the correlation of the runs within a seed, whose "
        "square is the share of the forgetting's variance that the drift explains. Methods that "
        "answer old tasks with a part of the network are left out, and settings of few methods.",
    ]
    for name, piece in PIECES.items():
        if name in ("confirm", "confirm-digits") and (rows := _rows(name)):
            parts += [f"## {piece['about']}", drift_table(rows)]
    return "\n\n".join([*parts, ""])


def drift_table(rows: Sequence[Row]) -> str:
    """Return by layer how far responses drift, and the correlation with forgetting.

    Both are held against each other within a seed. Methods whose old tasks are answered by a part
    of the network are left out: theirs is of choosing and retraining that part.
    """
    done = [row for row in rows if row["status"] == "done" and row["drift"]]
    done = [row for row in done if row["remark"] != PackNet.remark]
    tuned = [row for row in done if row["strategy"] == "finetune"]
    forgotten = _within_seeds([row["forgetting"] for row in done], done)
    lines = []
    for layer in sorted(done[0]["drift"] if done else [], key=_place):
        drift = _within_seeds([row["drift"][layer] for row in done], done)
        known = f"{correlation(drift, forgotten):z.2f}"
        lines.append([layer, f"{fmean(row['drift'][layer] for row in tuned):.2f}", known])
    count = len(set(map(method, done)))
    return markdown(["layer", "fine-tuning's drift", f"r ({count} methods)"], lines)


def stability() -> str:
    """Return how well rankings by halves of the images agree, and with the truth, as Markdown."""
    rows = _rows("stability")
    criteria = list(dict.fromkeys(row["criterion"] for row in rows))
    mine = [[row for row in rows if row["criterion"] == criterion] for criterion in criteria]
    layers = sorted(mine[0][0]["ablation"], key=_place) if mine else []
    lines = []
    for layer in layers:
        halves = [
            [row["checks"]["halves"].get(layer, {}).get("spearman") for row in members]
            for members in mine
        ]
        truth = [fmean(fmean(row["ablation"][layer]) for row in members) for members in mine]
        lines.append([layer, *map(_mean_and_lowest, halves), *(f"{r:z.2f}" for r in truth)])
    heads = [f"{c}, halves" for c in criteria] + [f"{c}, ablation" for c in criteria]
    parts = [
        "# Whether rankings can be trusted",
        f"Spearman's correlation of the order of filters by one half of the images with that by "
        f"the other, and of the scores with those of `ablation`, mean over "
        f"{len(mine[0]) if mine else 0} seeds; of the halves the lowest seed in brackets.",
        markdown(["layer", *heads], lines),
    ]
    return "\n\n".join([*parts, ""])


def _mean_and_lowest(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):z.2f} ({min(known):z.2f})" if known else "–"


def _place(layer: str) -> tuple[int, str]:
    """Return what sorts layers by their numbers."""
    return len(layer), layer


def _within_seeds(values: Sequence[float], rows: Sequence[Row]) -> list[float]:
    """Return how far each run's value is above its seed's mean."""
    by_seed: dict[int, list[float]] = {}
    for value, row in zip(values, rows, strict=True):
        by_seed.setdefault(row["seed"], []).append(value)
    return [v - fmean(by_seed[row["seed"]]) for v, row in zip(values, rows, strict=True)]


def _table(rows: Sequence[Row]) -> str:
    lines = []
    named = [row | {"method": method(row)} for row in rows]
    for group, members in groups(named, "method"):
        done = [row | kept_and_learned(row) for row in members if row["status"] == "done"]
        figures = [percent(measure(_by_seed(done, name), name)) for name in _MEASURED]
        size = _mean(row["memory_bytes"] / 1e6 for row in done)
        seconds = _mean(row["seconds"] for row in done if row["seconds"] is not None)
        seeds = len({row["seed"] for row in done})
        lost = len({row["seed"] for row in members}) - seeds
        count = f"{seeds} ({lost} failed)" if lost else str(seeds)
        lines.append([group["method"], *figures, size, seconds, count])
    heads = ["method", "kept", "learned", "mean", "mean, task not told", "MB", "seconds", "seeds"]
    return markdown(heads, lines)


def _mean(values: Iterable[float]) -> str:
    known = list(values)
    return f"{fmean(known):.1f}" if known else "–"


def _failed(piece: str) -> str:
    rows = [row | {"method": method(row)} for row in _rows(piece) if row["status"] != "done"]
    named = [
        (of["method"], ", ".join(str(r["seed"]) for r in mine))
        for of, mine in groups(rows, "method")
    ]
    return "; ".join(f"{name} (seed {seeds})" for name, seeds in named)


def _by_seed(rows: Sequence[Row], name: str) -> list[Row]:
    """Return a row a seed: of several draws by chance the mean."""
    return [
        {name: sum(row[name] for row in members) / len(members)}
        for _, members in groups(rows, "seed")
        if all(row[name] is not None for row in members)
    ]


if __name__ == "__main__":
    main()
