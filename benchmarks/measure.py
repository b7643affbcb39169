"""Measure two ways to do a job, interleaved, and hold them against what the machine can do."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """Two ways to do one job.

    Attributes
    ----------
    name
        For the table.
    ours, theirs
        What is timed; ``theirs`` is None where there is nothing to compare with.
    units, their_units
        How many units one call does; times are of one unit.
    operations
        Floating-point operations of a unit of ours, or None.
    precision
        Of ours.
    target
        The least ratio, or with a limit the most seconds, for people to read.
    """

    name: str
    ours: Work
    theirs: Work | None = None
    units: float = 1
    their_units: float = 1
    operations: float | None = None
    precision: str = "float32"
    target: str = ""


@dataclass(frozen=True)
class Result:
    """Milliseconds of a unit, in each round.

    Attributes
    ----------
    job
        What was measured; composed results have one of their own.
    ours, theirs
        A number for each round; ``theirs`` is empty where there is nothing to compare with.
    """

    job: Job
    ours: list[float]
    theirs: list[float]

    def row(self, peaks: dict[str, float], device: str) -> dict[str, object]:
        """Return the row of the table; ``peaks`` are operations per second by precision."""
        ratios = [t / o for t, o in zip(self.theirs, self.ours, strict=False)]
        ours = statistics.median(self.ours)
        floor = None
        if self.job.operations is not None:
            floor = 1000 * self.job.operations / peaks[self.job.precision]
        return {
            "job": self.job.name,
            "ours_ms": _round(ours),
            "theirs_ms": _round(statistics.median(self.theirs)) if self.theirs else None,
            "ratio": _round(statistics.median(ratios)) if ratios else None,
            "ratio_min": _round(min(ratios)) if ratios else None,
            "ratio_max": _round(max(ratios)) if ratios else None,
            "floor_ms": None if floor is None else _round(floor),
            "floor_share": None if floor is None else _round(floor / ours),
            "precision": self.job.precision,
            "device": device,
            "target": self.job.target,
        }


def measure(jobs: list[Job], rounds: int, least: float = 0.4) -> list[Result]:
    """Time every job in turn, ``rounds`` times.

    Parameters
    ----------
    jobs
        What to time.
    rounds
        How often; one more, which does not count, comes first.
    least
        Seconds: a call that takes less is repeated, as often in each round.
    """
    times: dict[str, tuple[list[float], list[float]]] = {job.name: ([], []) for job in jobs}
    calls: dict[tuple[str, bool], int] = {}
    for round_ in range(rounds + 1):
        for job in jobs:
            ours, theirs = times[job.name]
            # Whoever is first finds a colder cache: they take turns.
            sides = [(job.ours, job.units, ours), (job.theirs, job.their_units, theirs)]
            for work, units, into in sides[:: -1 if round_ % 2 else 1]:
                if work is None:
                    continue
                side = (job.name, into is ours)
                taken = _seconds(work, calls.setdefault(side, 1))
                if round_:
                    into.append(1000 * taken / units)
                else:
                    calls[side] = max(1, round(least / taken))
    return [Result(job, *times[job.name]) for job in jobs]


def peaks(device: torch.device, repeats: int = 40) -> dict[str, float]:
    """Measure the most operations per second, by precision.

    The better of a matrix product and a convolution, whose libraries differ: both well shaped. A
    machine that others use too is measured best in several moments.
    """
    found = {}
    for precision in ("float32", "bfloat16"):
        dtype = getattr(torch, precision)
        matrix = torch.randn(2048, 2048, device=device).to(dtype)
        images = torch.randn(64, 256, 8, 8, device=device).to(dtype)
        images = images.to(memory_format=torch.channels_last)
        filters = torch.randn(256, 256, 3, 3, device=device).to(dtype)
        filters = filters.to(memory_format=torch.channels_last)
        works: list[tuple[Work, float]] = [
            (lambda m=matrix: m @ m, 2 * 2048**3),
            (lambda i=images, f=filters: torch.conv2d(i, f, None, 1, 1), 2 * 64**2 * 256**2 * 9),
        ]
        with torch.no_grad():
            found[precision] = max(
                operations / min(_seconds(work) for _ in range(repeats))
                for work, operations in works
            )
    return found


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Write the rows as JSON."""
    path.write_text(json.dumps(rows, indent=1) + "\n")


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows as a Markdown table."""
    heads = ["job", "precision", "ours (ms)", "theirs (ms)", "ratio (min–max)", "target"]
    heads += ["floor (ms)", "share of floor"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        ratio = "–"
        if row["ratio"] is not None:
            ratio = f"{row['ratio']:g}x ({row['ratio_min']:g}–{row['ratio_max']:g})"
        cells = [row["job"], row["precision"], _shown(row["ours_ms"]), _shown(row["theirs_ms"])]
        cells += [ratio, row["target"] or "–", _shown(row["floor_ms"])]
        share = row["floor_share"]
        cells += ["–" if share is None else f"{share:.0%}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return "–" if value is None else f"{value:,g}"


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def _seconds(work: Work, calls: int = 1) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls
