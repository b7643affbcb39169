"""What the fault tests share: a short form in every test run, a long form by `make torture`.

Each test counts its trials in a tally; the long form writes all tallies to metrics/torture.json.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from workflow import Undisturbed, WatchedProject, run_undisturbed

REPORT = Path(__file__).parents[2] / "metrics" / "torture.json"


@dataclass
class Tally:
    """How often a fault was tried and survived."""

    fault: str
    tried: int = 0
    survived: int = 0
    epochs_lost: int = 0  # the most that one trial had to train again
    seconds: float = 0.0  # the longest that a stop took
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def trial(self, what: object) -> Iterator[None]:
        """Count a trial; one that fails does not keep the others from running."""
        self.tried += 1
        try:
            yield
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")
        else:
            self.survived += 1

    def lost(self, epochs: int) -> None:
        """Note how many epochs a trial had to train again."""
        self.epochs_lost = max(self.epochs_lost, epochs)

    def stopped(self, seconds: float) -> None:
        """Note how long a stop took."""
        self.seconds = max(self.seconds, round(seconds, 1))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str], "contextmanager[Tally]"]:
    """Return a context that counts trials, and fails at its end if one was not survived."""

    @contextmanager
    def count(fault: str) -> Iterator[Tally]:
        tally = Tally(fault)
        try:
            yield tally
        except BaseException:
            tally.tried += 1  # or the table would not show what failed outside a trial
            raise
        finally:
            row = asdict(tally)
            failures = row.pop("failures")
            request.node.user_properties.append(("tally", row))
        assert tally.tried, f"{fault}: nothing was tried"
        assert not failures, "\n".join([f"{fault}: {len(failures)} of {tally.tried}:", *failures])

    return count


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Return a choice between the rounds of the short and of the long form."""
    long = request.config.getoption("--torture", default=False)
    return lambda short_form, long_form: long_form if long else short_form


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return what a run of the tiny project leaves that nobody disturbs."""
    return run_undisturbed(WatchedProject(tmp_path_factory.mktemp("undisturbed") / "project"))


@pytest.fixture(scope="session")
def before_sweep(tmp_path_factory: pytest.TempPathFactory) -> WatchedProject:
    """Return a project that has run up to its sweep."""
    project = WatchedProject(tmp_path_factory.mktemp("prepared") / "project")
    project.run("dvc", "repro", "evaluate", "tune")
    return project


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the long form."""
    parser.addoption("--torture", action="store_true", help="the long form of the fault tests")


def _together(rows: list[dict]) -> list[dict]:
    """Return one row for each fault, which several tests may have tried."""
    faults: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: row["fault"]):
        known = faults.setdefault(row["fault"], row | {"tried": 0, "survived": 0})
        known["tried"] += row["tried"]
        known["survived"] += row["survived"]
        for most in ("epochs_lost", "seconds"):
            known[most] = max(known[most], row[most])
    return list(faults.values())


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print the tallies of all tests; the long form writes them too."""
    reports = [r for group in ("passed", "failed") for r in terminalreporter.getreports(group)]
    rows = [row for r in reports for name, row in r.user_properties if name == "tally"]
    if not config.getoption("--torture", default=False):
        return
    rows = _together(rows)
    terminalreporter.write_sep("=", "faults")
    width = max((len(row["fault"]) for row in rows), default=0)
    terminalreporter.write_line(f"{'fault':{width}}  tried  survived  epochs lost  stopped in (s)")
    for row in rows:
        counts = f"{row['tried']:5}  {row['survived']:8}  {row['epochs_lost']:11}"
        counts += f"  {row['seconds'] or '':>14}"
        terminalreporter.write_line(f"{row['fault']:{width}}  {counts}")
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(rows, indent=1) + "\n")
