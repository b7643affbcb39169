"""The tables of the comparison, as Markdown."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from permafrost.evaluation import Interval, accuracy_name, confidence_interval, value_range

Row = dict[str, Any]


def measure(rows: Iterable[Row], name: str) -> Interval | None:
    """Return the mean and the interval over the seeds; None where no seed has the measure."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return confidence_interval(values, value_range(name)) if values else None


def paired(pairs: Iterable[tuple[Row, Row]], name: str) -> Interval | None:
    """Return the mean difference between two runs of the same seed, and its interval.

    Parameters
    ----------
    pairs : iterable of (dict, dict)
        Of each seed; where one of the two lacks the measure, the pair does not count.
    name : str
        Of a measure between 0 and 1.
    """
    values = [(left.get(name), right.get(name)) for left, right in pairs]
    found = [one - other for one, other in values if one is not None and other is not None]
    return confidence_interval(found, (-1, 1)) if found else None


def measures(rows: Sequence[Row], tasks: int) -> dict[str, Interval | None]:
    """Return the accuracy on each task, their mean and the forgetting, over the seeds."""
    names = [*map(accuracy_name, range(tasks)), "acc_mean", "forgetting"]
    return {name: measure(rows, name) for name in names}


def percent(interval: Interval | None) -> str:
    """Format an interval as ``71.2 (64.0 to 78.4)``, in percent."""
    if interval is None:
        return "–"
    mean = f"{100 * interval.mean:z.1f}"
    if interval.low is None or interval.high is None:
        return mean
    return f"{mean} ({100 * interval.low:z.1f} to {100 * interval.high:z.1f})"


def groups(rows: Sequence[Row], *names: str) -> list[tuple[Row, list[Row]]]:
    """Group rows by columns, in the order of their first rows: the column values, the rows."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return [(dict(zip(names, values, strict=True)), members) for values, members in found.items()]


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; cell text is escaped."""
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(escape(cell) for cell in line) + " |" for line in table)


def accuracy_table(
    labels: Sequence[str],
    members: Sequence[tuple[Sequence[str], Sequence[Row]]],
    tasks: int,
    *,
    more: Callable[[Sequence[str], Sequence[Row]], Sequence[str]] | None = None,
    headings: Sequence[str] = (),
) -> str:
    """Return a table of accuracies with mean and 95% interval, in percent.

    Failed runs count in no mean; the line's label says of how many seeds they are.

    Parameters
    ----------
    labels : sequence of str
        Headings of the first columns.
    members : sequence of (sequence of str, sequence of dict)
        The first columns of a line, and the runs that it summarises.
    tasks : int
        T.
    more : callable, optional
        Given a line's first columns and its runs, further columns.
    headings : sequence of str
        Of those.
    """
    names = [f"task {task + 1}" for task in range(tasks)] + ["mean", "forgetting"]
    lines = []
    for first, rows in members:
        further = more(first, rows) if more else ()
        failed = sum(row.get("status") == "failed" for row in rows)
        note = [f"{first[-1]} (failed: {failed} of {len(rows)} seeds)"] if failed else first[-1:]
        figures = map(percent, measures(rows, tasks).values())
        lines.append([*first[:-1], *note, *figures, *further])
    return markdown([*labels, *names, *headings], lines)


# An underscore within a word, as in linear_probe, marks nothing up.
_MARKUP = re.compile(r"[&<>|`*~$\\\[\]]|(?<![^\W_])_|_(?![^\W_])")


def escape(text: str) -> str:
    """Return text as one line of Markdown that shows it as it is."""
    return _MARKUP.sub(lambda found: _entity(found[0]), " ".join(text.split()))


def _entity(character: str) -> str:
    return {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.get(character, f"&#{ord(character)};")
