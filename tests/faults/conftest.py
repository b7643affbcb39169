"""What the fault tests share: a short form in every test run, a long form by `make torture`.

Each test counts its trials in a tally; the long form writes all tallies to metrics/torture.json.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from edges import CPU, MILD
from hostile_data import fill
from permafrost.data import Batches
from permafrost.strategies import Learner, Progress
from permafrost.tracking import EXPERIMENTS, Tracker
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


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """Return a database as MLflow makes it, to be copied: making one takes seconds."""
    root = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in EXPERIMENTS:
            Tracker(root).experiment_id(name)
    return root / "mlflow.db"


@pytest.fixture
def make_root(tmp_path, monkeypatch):
    """Return a builder of projects, with the tracking URI of each."""
    for name in ("TRACKING_URI", "TRACKING_USERNAME", "TRACKING_PASSWORD", "TRACKING_TOKEN"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    monkeypatch.delenv("PERMAFROST_FRESH", raising=False)
    count = iter(range(1000))

    def build(uri=None):
        root = tmp_path / f"project{next(count)}"
        root.mkdir()
        use(uri)
        return root

    def use(uri):
        if uri is None:
            monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    build.use = use
    return build


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], Path]:
    """Return a builder of good folders, each in a new parent that is outside of it."""
    made = []

    def build() -> Path:
        made.append(tmp_path / str(len(made)) / "images")
        return fill(made[-1])

    return build


@pytest.fixture
def view(make_network):
    """Return a builder of classifiers of the first task."""
    return lambda **options: make_network(**options).view("shared", 0, 1)


@pytest.fixture
def batches(make_sequence):
    """Return eight images of two classes."""
    sequence = make_sequence()
    return Batches(sequence.tasks[0].train, sequence.normalization, CPU)


@pytest.fixture
def learn(make_strategy, learn_first, keep):
    """Return a function that learns the second task, or all jointly; returns the progress."""

    def run(network, sequence, name, config, head="shared", first=MILD, masks=None):
        strategy = make_strategy(name, head, masks) if masks else make_strategy(name, head)
        learner = Learner(sequence, config, head=head, seed=0, device=CPU, keep=keep)
        progress = Progress(0, [learner.measure(network, 0)])
        if strategy.continues:
            progress.memory = learn_first(network, sequence, first, strategy)
            progress.rows.append(learner.measure(network, 1))
            progress.learned = 1
        strategy.learn(learner, network, progress)
        return progress

    return run


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
