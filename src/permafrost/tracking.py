"""MLflow: the only place that imports it.

What happened is known from files (cells and variants); MLflow mirrors them. A training logs live
while it runs, and :func:`reconcile` makes the store equal to the files at any time, so that a
store that was down, a stage that DVC restored and a training that was killed lose nothing.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

Result = TypeVar("Result")

CELLS, FIRST_TASKS, VARIANTS = "permafrost", "permafrost-first-task", "permafrost-variants"
TRIALS = "permafrost-trials"
EXPERIMENTS = (CELLS, FIRST_TASKS, VARIANTS, TRIALS)

_FINISHED, _RUNNING = "FINISHED", "RUNNING"


@dataclass(frozen=True)
class RunRecord:
    """All that one MLflow run holds.

    Attributes
    ----------
    key : str
        Identifies what was run; the run is tagged ``key`` with it.
    experiment : str
        One of :data:`EXPERIMENTS`.
    name : str
        Shown in the UI.
    params : mapping
        Parameters.
    metrics : mapping of str to float
        Results at the end.
    curves : list of mapping
        Metrics by step; each mapping has a ``step``.
    pictures : mapping of str to Path
        Artifacts: path in the run to file.
    tags : mapping of str to str
        Further tags.
    """

    key: str
    experiment: str
    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: list[Mapping[str, float]] = field(default_factory=list)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


class Tracker:
    """Writes runs into the store of one project.

    No method raises because of the store: the first failure is told once on stderr, and the
    tracker is silent from then on; ``permafrost track`` brings the store up to date later.

    Parameters
    ----------
    root : Path
        The project's root. The store is ``mlflow.db`` there, wherever the command runs, unless
        MLFLOW_TRACKING_URI names another.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}
        self._failed = False

    @property
    def uri(self) -> str:
        """Where the store is."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    def prepare(self) -> None:
        """Create the store if it is not there."""
        self._attempt(self._connect)

    @contextmanager
    def live(self, record: RunRecord) -> Iterator["LiveRun"]:
        """Log a training while it runs; the run of an earlier attempt is replaced.

        Parameters
        ----------
        record : RunRecord
            What is known before the training: key, experiment, name and params.

        Yields
        ------
        LiveRun
            Left in RUNNING if the block ends without :meth:`LiveRun.finish`.
        """
        run_id = self._attempt(lambda: self._start(record))
        yield LiveRun(self, run_id)

    def write(self, record: RunRecord) -> None:
        """Make the store hold exactly one run of this key: finished, with all of the record."""
        self._attempt(lambda: self._rewrite(record))

    def reconcile(
        self, records: Iterable[RunRecord], is_active: Callable[[str], bool]
    ) -> dict[str, int]:
        """Make the store equal to the records, one finished run each.

        Runs of other keys stay, except those that a killed process left RUNNING: these are deleted
        unless ``is_active`` says that their key is being trained now.

        Returns
        -------
        dict
            How many runs were ``written``, ``deleted`` and ``kept``.

        Raises
        ------
        TrackingError
            If the store cannot be used.
        """
        return self._try(lambda: self._reconcile(records, is_active))

    # The rest may raise whatever MLflow raises.

    def _try(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except Exception as error:
            raise TrackingError(f"MLflow at {_public(self.uri)}: {_first_line(error)}") from error

    def _attempt(self, action: Callable[[], Result]) -> Result | None:
        if self._failed:
            return None
        try:
            return self._try(action)
        except TrackingError as error:
            self._failed = True
            print(f"{error}; the training goes on, `permafrost track` logs it", file=sys.stderr)
            return None

    def _connect(self) -> "MlflowClient":
        if self._client is None:
            # Set before the import: MLflow reads them once.
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
            os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
            logging.getLogger("alembic").setLevel(logging.WARNING)
            from mlflow.tracking import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.WARNING)
            lock = self.root / ".permafrost" / "mlflow.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):  # processes that create one database at once crash
                client = MlflowClient(self.uri)
                self._experiments = {name: self._experiment(client, name) for name in EXPERIMENTS}
            self._client = client
        return self._client

    def _experiment(self, client: "MlflowClient", name: str) -> str:
        found = client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        # A relative default would put artifacts wherever the command happens to run.
        local = self.uri.startswith("sqlite:")
        location = (self.root / "mlruns" / name).as_uri() if local else None
        # Without the kind MLflow's pages take an experiment without traces for one of an agent.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(name, artifact_location=location, tags=tags))

    def experiment_ids(self) -> dict[str, str]:
        """Return the ids of the experiments, by name; they are created if need be."""
        self._try(self._connect)
        return self._experiments

    def _runs(self, experiment: str, condition: str = "") -> list["Run"]:
        client = self._connect()
        runs: list[Run] = []
        token = None
        while True:
            page = client.search_runs(
                [self._experiments[experiment]], condition, max_results=1000, page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _start(self, record: RunRecord) -> str:
        from mlflow.entities import Param

        client = self._connect()
        for run in self._runs(record.experiment, f"tags.key = '{record.key}'"):
            client.delete_run(run.info.run_id)
        tags = {"key": record.key, **record.tags}
        run = client.create_run(
            self._experiments[record.experiment], run_name=record.name, tags=tags
        )
        params = [Param(name, str(value)) for name, value in record.params.items()]
        client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    def _rewrite(self, record: RunRecord) -> None:
        run_id = self._start(record)
        self._log_curves(run_id, record.curves)
        self._finish(run_id, record)

    def _log_curves(self, run_id: str, rows: list[Mapping[str, float]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), _now(), int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name != "step"
        ]
        for begin in range(0, len(metrics), 1000):  # MLflow's limit for one batch
            self._connect().log_batch(run_id, metrics=metrics[begin : begin + 1000])

    def _finish(self, run_id: str, record: RunRecord) -> None:
        # At step 0 MLflow draws a result as a bar beside those of the other runs.
        self._log_curves(run_id, [{"step": 0, **record.metrics}])
        client = self._connect()
        for place, path in record.pictures.items():
            folder, _, _ = place.rpartition("/")
            client.log_artifact(run_id, str(path), folder or None)
        client.set_terminated(run_id, _FINISHED)

    def _reconcile(
        self, records: Iterable[RunRecord], is_active: Callable[[str], bool]
    ) -> dict[str, int]:
        counts = {"written": 0, "deleted": 0, "kept": 0}
        runs: dict[str, list[Run]] = {}
        for experiment in EXPERIMENTS:
            for run in self._runs(experiment):
                runs.setdefault(run.data.tags.get("key", ""), []).append(run)
        for record in records:
            found = runs.pop(record.key, [])
            if [run.info.status for run in found] == [_FINISHED]:
                counts["kept"] += 1
            elif not is_active(record.key):
                self._rewrite(record)
                counts["written"] += 1
                counts["deleted"] += len(found)
        for key, found in runs.items():
            for run in found:
                if key and run.info.status == _RUNNING and not is_active(key):
                    self._connect().delete_run(run.info.run_id)
                    counts["deleted"] += 1
        return counts


class LiveRun:
    """One run under way."""

    def __init__(self, tracker: Tracker, run_id: str | None) -> None:
        self._tracker = tracker
        self._run_id = run_id

    def log(self, rows: list[Mapping[str, float]]) -> None:
        """Log rows of a curve, each with its ``step``."""
        if self._run_id is not None:
            run_id = self._run_id
            self._tracker._attempt(lambda: self._tracker._log_curves(run_id, rows))

    def finish(self, record: RunRecord) -> None:
        """Log the results and mark the run finished."""
        if self._run_id is not None:
            run_id = self._run_id
            self._tracker._attempt(lambda: self._tracker._finish(run_id, record))


class TrackingError(Exception):
    """The MLflow store cannot be used."""


def _now() -> int:
    return int(time.time() * 1000)


def _public(uri: str) -> str:
    """Strip a user name and password from a URI."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2] if scheme.startswith('http') else rest}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
