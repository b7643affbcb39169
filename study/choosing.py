"""`python -m study.choosing`: how the recommended method was chosen, on validation images."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from permafrost.artifacts import write_atomically
from permafrost.tables import Row, markdown
from study.__main__ import PIECES, REPOSITORY, best_hyperparameters, read_rows

CHOOSING = REPOSITORY / "docs/results/choosing.md"
# Each setting's pieces: all ideas on the first seeds, then the best of them on others.
SETTINGS = {
    "two tasks": ["ideas", "finals"],
    "photographs, then digits": ["ideas-far", "finals-far"],
    "five tasks": ["finals-sequence"],
}
BASELINES = ("lwf", "packnet")


def main() -> None:
    """Write the tables of tuning and of the ideas' margins."""
    write_atomically(CHOOSING, choosing().encode())


def choosing() -> str:
    """Return both tables, as Markdown."""
    return "\n\n".join(
        [
            "# How the method was chosen",
            "On validation images, a fifth of the training images; the test images were hidden. "
            "Figures are mean accuracies over the tasks, in percent.",
            "## Hyperparameters",
            trials_table(),
            "## Ideas",
            "Margin: the mean accuracy minus that of the best of LwF, PackNet and the idea's own "
            "twins, means over the seeds. The seeds of a setting are in brackets.",
            ideas_table(),
            "",
        ]
    )


def trials_table() -> str:
    """Return what was tried, a line for each method, piece and trial."""
    lines = []
    for name in (name for name, piece in PIECES.items() if piece.get("target") == "tune"):
        tried = defaultdict(list)
        for row in read_rows(name):
            tried[row["strategy"], _words(row["hyper"])].append(row)
        best = best_hyperparameters(name)
        for (strategy, hyper), rows in sorted(tried.items()):
            is_best = _words(best[strategy][0]) == hyper
            mean = f"**{_mean(rows)}**" if is_best else _mean(rows)
            lines.append([name, strategy, hyper, mean])
    return markdown(["piece", "method", "hyperparameters", "mean (chosen in bold)"], lines)


def ideas_table() -> str:
    """Return the margin of each idea in each setting, the highest mean first."""
    found = {name: margins(_rows(pieces)) for name, pieces in SETTINGS.items()}
    ideas = dict.fromkeys(idea for margin in found.values() for idea in margin)
    lines = []
    for idea in ideas:
        known = [margin[idea] for margin in found.values() if idea in margin]
        cells = [_cell(margin.get(idea)) for margin in found.values()]
        lines.append([idea, *cells, f"{100 * fmean(value for value, *_ in known):+.1f}"])
    lines.sort(key=lambda line: float(line[-1]), reverse=True)
    return markdown(["idea", *found, "mean margin"], lines)


def margins(rows: Sequence[Row]) -> dict[str, tuple[float, str, int]]:
    """Return each idea's margin, what it is held against and on how many seeds."""
    found = {}
    methods = defaultdict(list)
    for row in rows:
        methods[_method(row)].append(row)
    for name, mine in methods.items():
        first = mine[0]
        if first["twin"] or first["metric"] == "random" or not _has_twin(first, methods):
            continue
        seeds = {row["seed"] for row in mine}
        rivals = {
            rival: _accuracy([row for row in theirs if row["seed"] in seeds])
            for rival, theirs in methods.items()
            if rival in BASELINES or _is_twin(theirs[0], first)
        }
        best = max(rivals, key=rivals.__getitem__)
        found[name] = _accuracy(mine) - rivals[best], best, len(seeds)
    return found


def _has_twin(row: Row, methods: dict[str, list[Row]]) -> bool:
    return any(_is_twin(theirs[0], row) for theirs in methods.values())


def _is_twin(row: Row, of: Row) -> bool:
    """Return whether a row is of another's twin; a ranking's is the one drawn by chance."""
    if row["strategy"] != of["strategy"] or row["pct"] != of["pct"]:
        return False
    return bool(row["twin"]) or (row["metric"] == "random" and of["metric"] is not None)


def _method(row: Row) -> str:
    parts = [row["strategy"], row["metric"], f"{row['pct']:.0%}" if row["pct"] else None]
    parts += [f"({row['twin']})" if row["twin"] else None]
    return " ".join(part for part in parts if part)


def _rows(pieces: Sequence[str]) -> list[Row]:
    return [row for name in pieces for row in read_rows(name)]


def _accuracy(rows: Sequence[Row]) -> float:
    return fmean(row["acc_mean"] if row["status"] == "done" else 0.0 for row in rows)


def _mean(rows: Sequence[Row]) -> str:
    return f"{100 * _accuracy(rows):.1f}"


def _words(hyper: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(hyper.items()))


def _cell(margin: tuple[float, str, int] | None) -> str:
    if margin is None:
        return "–"
    value, rival, seeds = margin
    return f"{100 * value:+.1f} to {rival} ({seeds})"


if __name__ == "__main__":
    main()
