"""`python -m study.choosing`: how the recommended method was chosen, on validation images."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from statistics import fmean

from permafrost.artifacts import write_atomically
from permafrost.tables import Row, markdown
from study.__main__ import PIECES, REPOSITORY, best_hyperparameters, is_done, method, read_rows

CHOOSING = REPOSITORY / "docs/results/choosing.md"
# Each setting's pieces.
SETTINGS = {
    "two tasks": ["ideas", "twins"],
    "photographs, then digits": ["ideas-far", "twins-far"],
}
BASELINES = ("lwf", "packnet")
# What explains nothing.
PLAIN = ("finetune", *BASELINES)


def main() -> None:
    """Write the tables of tuning and of the ideas' margins."""
    write_atomically(CHOOSING, choosing().encode())


def choosing() -> str:
    """Return both tables, as Markdown."""
    parts = [
        "# How the method was chosen",
        "On validation images, a fifth of the training images; the test images were hidden. "
        "Figures are mean accuracies over the tasks, in percent. What diverged counts as 0.",
        "## Hyperparameters",
        trials_table(),
    ]
    if any(map(read_rows, chain(*SETTINGS.values()))):
        parts += [
            "## Ideas",
            "Margin: the mean accuracy minus that of the best of LwF, PackNet and, where it has "
            "been run with them, the idea's own twins, means over the seeds. How many seeds is in "
            "brackets.",
            ideas_table(),
        ]
    return "\n\n".join([*parts, ""])


def trials_table() -> str:
    """Return what was tried, a line for each method, piece and trial."""
    lines = []
    chosen = _chosen()
    for name in (name for name, piece in PIECES.items() if piece.get("target") == "tune"):
        tried = defaultdict(list)
        for row in read_rows(name):
            tried[row["strategy"], _words(row["hyper"])].append(row)
        for (strategy, hyper), rows in sorted(tried.items()):
            taken = "yes" if (name, strategy, hyper) in chosen else ""
            lines.append([name, strategy, hyper, _mean(rows), taken])
    return markdown(["piece", "method", "hyperparameters", "mean", "taken on"], lines)


def _chosen() -> set[tuple[str, str, str]]:
    """Return the trials that a later piece takes: piece, method and hyperparameters."""
    chosen = set()
    for piece in PIECES.values():
        taken: dict[str, tuple[str, str, str]] = {}
        for name in piece.get("tuned", []):
            best = best_hyperparameters(name) if is_done(name) else {}
            taken |= {strategy: (name, strategy, _words(b[0])) for strategy, b in best.items()}
        used = piece["changes"].get("sweep.strategies", [])
        chosen |= {trial for strategy, trial in taken.items() if strategy in used}
    return chosen


def ideas_table() -> str:
    """Return the margin of each idea in each setting: those tried in all first, best first."""
    found = {name: margins(_rows(pieces)) for name, pieces in SETTINGS.items()}
    ideas = dict.fromkeys(idea for margin in found.values() for idea in margin)
    lines: list[tuple[tuple[int, float], list[str]]] = []
    for idea in ideas:
        known = [margin[idea] for margin in found.values() if idea in margin]
        cells = [_cell(margin.get(idea)) for margin in found.values()]
        mean = fmean(value for value, *_ in known)
        lines.append(((len(known), mean), [idea, *cells, f"{100 * mean:+.1f}"]))
    lines.sort(reverse=True)
    return markdown(["idea", *found, "mean margin"], [line for _, line in lines])


def margins(rows: Sequence[Row]) -> dict[str, tuple[float, int, str]]:
    """Return each idea's margin, on how many seeds, and what it is held against."""
    found = {}
    methods = defaultdict(list)
    for row in rows:
        methods[method(row)].append(row)
    for name, mine in methods.items():
        first = mine[0]
        if first["twin"] or first["metric"] == "random" or first["strategy"] in PLAIN:
            continue
        found[name] = min(
            (*_above(mine, theirs), rival)
            for rival, theirs in methods.items()
            if (rival in BASELINES or _is_twin(theirs[0], first)) and _shared(mine, theirs)
        )
    return found


def _shared(mine: Sequence[Row], theirs: Sequence[Row]) -> set[int]:
    return {row["seed"] for row in mine} & {row["seed"] for row in theirs}


def _above(mine: Sequence[Row], theirs: Sequence[Row]) -> tuple[float, int]:
    """Return how far one method is above another on the seeds that both have, and how many."""
    seeds = _shared(mine, theirs)
    left, right = (_accuracy([r for r in rows if r["seed"] in seeds]) for rows in (mine, theirs))
    return left - right, len(seeds)


def _is_twin(row: Row, of: Row) -> bool:
    """Return whether a row is of another's twin; a ranking's is the one drawn by chance."""
    if row["strategy"] != of["strategy"] or row["pct"] != of["pct"]:
        return False
    return bool(row["twin"]) or (row["metric"] == "random" and of["metric"] is not None)


def _rows(pieces: Sequence[str]) -> list[Row]:
    return [row for name in pieces for row in read_rows(name)]


def _accuracy(rows: Sequence[Row]) -> float:
    return fmean(row["acc_mean"] if row["status"] == "done" else 0.0 for row in rows)


def _mean(rows: Sequence[Row]) -> str:
    return f"{100 * _accuracy(rows):.1f}"


def _words(hyper: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(hyper.items()))


def _cell(margin: tuple[float, int, str] | None) -> str:
    if margin is None:
        return "–"
    value, seeds, rival = margin
    return f"{100 * value:+.1f} to {rival} ({seeds})"


if __name__ == "__main__":
    main()
