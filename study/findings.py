"""`python -m study.findings`: hold the plan's claims against the confirming rows.

study/plan.yaml lists the claims, each under the piece that decides it; docs/results/plan.md says
why.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from permafrost.artifacts import write_atomically
from permafrost.claims import Claim, Tested, claims_table, held_against, kept_and_learned
from permafrost.evaluation.comparisons import holm
from permafrost.tables import Row, groups, markdown, measure, percent
from study.__main__ import PIECES, REPOSITORY, read_rows

RESULTS = REPOSITORY / "docs/results"
PLAN = Path(__file__).with_name("plan.yaml")
_MEASURED = ("kept", "learned", "acc_mean", "acc_mean_without_task")


def main() -> None:
    """Write the claims and the tables."""
    if not PLAN.exists():
        sys.exit(f"{PLAN}: there is no plan yet")
    plan = yaml.safe_load(PLAN.read_text())
    tested = hold(plan["claims"])
    write_atomically(RESULTS / "claims.md", claims(tested, plan["tag"]).encode())
    write_atomically(RESULTS / "tables.md", tables().encode())


def hold(plan: dict[str, list[dict[str, Any]]]) -> dict[str, list[Tested]]:
    """Test each piece's claims on its rows; p is adjusted for all of them together."""
    tested = {
        piece: held_against(read_rows(piece), [Claim(**claim) for claim in claims])
        for piece, claims in plan.items()
    }
    every = [each for members in tested.values() for each in members]
    known = [each.difference.p for each in every if _has_p(each)]
    adjusted = iter(holm(known))
    return {
        piece: [
            replace(each, p_adjusted=next(adjusted)) if _has_p(each) else each for each in members
        ]
        for piece, members in tested.items()
    }


def _has_p(each: Tested) -> bool:
    return each.difference is not None and each.difference.p is not None


def claims(tested: dict[str, list[Tested]], tag: str) -> str:
    """Return the claims, piece by piece, as Markdown."""
    parts = [
        "# What holds",
        f"The plan is `docs/results/plan.md` at the tag `{tag}`, before the first of these rows "
        "was made. Differences in points of accuracy, paired by seed; p by the paired t test, "
        "adjusted by Holm's procedure over all claims of this page.",
    ]
    for piece, members in tested.items():
        parts += [f"## {PIECES[piece]['about']}", claims_table(members)]
    return "\n\n".join([*parts, ""])


def tables() -> str:
    """Return a table of all methods for each confirming piece, as Markdown."""
    parts = [
        "# All methods",
        "Test accuracy in percent, mean over the seeds with 95% intervals; memory besides the "
        "network while the last task is learned; seconds of one core's training.",
    ]
    for name, piece in PIECES.items():
        if "about" in piece and read_rows(name):
            parts += [f"## {piece['about']}", _table(read_rows(name))]
    return "\n\n".join([*parts, ""])


def _table(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row["status"] != "done"]
    done = [row | kept_and_learned(row) for row in rows if row["status"] == "done"]
    lines = []
    for group, members in groups(done, "strategy", "metric", "pct", "twin"):
        share = f"{group['pct']:.0%}" if group["pct"] else None
        twin = f"({group['twin']})" if group["twin"] else None
        name = " ".join(filter(None, [group["strategy"], group["metric"], share, twin]))
        size = sum(row["memory_bytes"] for row in members) / len(members) / 1e6
        known = [row["seconds"] for row in members if row["seconds"] is not None]
        seconds = f"{sum(known) / len(known):.0f}" if known else "–"
        figures = [percent(measure(_by_seed(members, m), m)) for m in _MEASURED]
        seeds = len({row["seed"] for row in members})
        lines.append([name, *figures, f"{size:.1f}", seconds, _count(seeds, group, failed)])
    heads = ["method", "kept", "learned", "mean", "mean, task not told", "MB", "seconds", "seeds"]
    return markdown(heads, lines)


def _count(seeds: int, group: Row, failed: Sequence[Row]) -> str:
    lost = [row for row in failed if all(row[name] == value for name, value in group.items())]
    return f"{seeds} ({len(lost)} failed)" if lost else str(seeds)


def _by_seed(rows: Sequence[Row], name: str) -> list[Row]:
    """Return a row a seed: of several draws by chance the mean."""
    return [
        {name: sum(row[name] for row in members) / len(members)}
        for _, members in groups(rows, "seed")
        if all(row[name] is not None for row in members)
    ]


if __name__ == "__main__":
    main()
