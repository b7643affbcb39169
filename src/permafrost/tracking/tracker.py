"""One project's runs in MLflow."""

import getpass
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.processes import project_lock
from permafrost.tracking.database import (
    artifacts_folder,
    database_file,
    database_uri,
    is_database,
    load_mlflow,
    make_database,
    refuse_other_schema,
    set_artifacts,
)
from permafrost.tracking.place import Place, find_place
from permafrost.tracking.redaction import redact
from permafrost.tracking.worker import Worker

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Run
    from mlflow.tracking import MlflowClient

RUNS, FIRST_TASKS, VARIANTS = "permafrost", "permafrost-first-task", "permafrost-variants"
TRIALS, CURVES = "permafrost-trials", "permafrost-curves"
EXPERIMENTS = (RUNS, FIRST_TASKS, VARIANTS, TRIALS, CURVES)

WAIT = 10.0  # the seconds that a training waits for MLflow, in all
STOPPED_WAIT = 2.0  # those of a training that is stopped

_FINISHED, _FAILED, _KILLED = "FINISHED", "FAILED", "KILLED"
_LONGEST_TAG = 5000  # of all servers; a new one takes 8000


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
        Further tags; a long one is cut.
    error : str, optional
        Why it failed; the run then ends as FAILED and is tagged ``error``.
    colour : str, optional
        In MLflow's charts, as ``#0072B2``; MLflow chooses one by itself.
    partial : bool
        Whether the training knew more: the record then only fills a gap, and leaves every run of
        its key that has ended as it is.
    """

    key: str
    experiment: str
    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: list[Mapping[str, float]] = field(default_factory=list)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    colour: str | None = None
    partial: bool = False

    @property
    def status(self) -> str:
        """How the run ends."""
        return _FINISHED if self.error is None else _FAILED

    @property
    def all_tags(self) -> dict[str, str]:
        """Return the run's tags, none longer than MLflow takes."""
        tags = {"key": self.key, **self.tags, "record": self._digest()}
        if self.error is not None:
            tags["error"] = self.error
        if self.colour is not None:
            tags["mlflow.runColor"] = self.colour
        return {name: str(value)[:_LONGEST_TAG] for name, value in tags.items()}

    def _digest(self) -> str:
        """Hash what else the run holds, to tell a run that lacks some of it."""
        pictures = {
            place: hashlib.sha256(path.read_bytes()).hexdigest()
            for place, path in self.pictures.items()
        }
        held = [dict(self.params), dict(self.metrics), [dict(row) for row in self.curves], pictures]
        held += [self.colour] if self.colour else []
        text = json.dumps(held, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def machine_tags(made_on: Mapping[str, str]) -> dict[str, str]:
    """Return what makes machines differ, as tags of a run."""
    return {f"machine.{name}": value for name, value in made_on.items()}


class Tracker:
    """Writes runs into the store of one project.

    A training hands over what it logs and goes on; only at its end does it wait, for at most
    :data:`WAIT` seconds. No method but :meth:`reconcile` and :meth:`experiment_id` raises because
    of the store: the first failure is told once on stderr, and the tracker is silent from then on;
    ``permafrost track`` brings the store up to date later.

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
        self._worker = Worker()
        self._failed = False

    @property
    def uri(self) -> str:
        """Where the store is."""
        return os.environ.get("MLFLOW_TRACKING_URI") or database_uri(self.root / "mlflow.db")

    @cached_property
    def place(self) -> Place:
        """Where the project is: the tag ``project`` of its runs names it."""
        return find_place(self.root)

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
            Left in RUNNING if the block ends without :meth:`LiveRun.finish`; FAILED or KILLED if
            it raises.
        """
        with self._settled():
            run = LiveRun(self, record)
            try:
                run.start()
                yield run
            except BaseException as error:
                run.stop(_FAILED if isinstance(error, Exception) else _KILLED)
                raise

    def write(self, record: RunRecord) -> None:
        """Make the store hold one run of this project and key, ended, with all of the record."""
        with self._settled():
            self._attempt(lambda: self._rewrite(record))

    def reconcile(
        self,
        records: Iterable[RunRecord],
        is_active: Callable[[str], bool],
        *,
        take_over: bool = False,
    ) -> dict[str, int]:
        """Make the store equal to the records, one run each, which has ended.

        Runs of other keys stay, but for those of trainings that did not come to their end: these
        are deleted unless ``is_active`` says that their key is being trained now. On a server the
        runs of other projects stay. Those that were logged where this project's files have been
        become its own if the folder was moved from there, or else by ``take_over``.

        Returns
        -------
        dict
            How many runs were ``written``, ``deleted`` and ``kept``; how many could be taken over,
            if any, are ``left``.

        Raises
        ------
        TrackingError
            If the store cannot be used.
        """
        with project_lock(self.root, "track"), self._told():  # two at once would write all twice
            return self._reconcile(records, is_active, take_over)

    def experiment_id(self, name: str) -> str:
        """Return the id of an experiment, which is created if need be; raise as `reconcile`."""
        with self._told():
            return self._experiment(name)

    def save_view(self, experiment: str, name: str, state: Mapping[str, Any]) -> None:
        """Keep a view of an experiment's page under a name, as that page does; raise likewise.

        One that is there stays, since its user may have changed it on the page.
        """
        view = {"name": name, "createdAt": 0, "updatedAt": 0, "state": json.dumps(dict(state))}
        with self._told():
            number = self._experiment(experiment)
            tag = f"mlflow.sharedViewState.{name}"
            if tag not in self._connect().get_experiment(number).tags:
                self._connect().set_experiment_tag(number, tag, json.dumps(view))

    # How the store is waited for. The worker's thread may hang as long as it likes.

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Wait at the end for all that is attempted in the block, if it is stopped but shortly."""
        self._guard(self._get_ready)  # takes seconds, in which no run is there to be ended
        try:
            yield
            if not self._failed and not self._worker.wait(WAIT):
                self._fail(f"{self._store} takes longer than {WAIT:g} s")
        except BaseException:
            if not self._worker.wait(STOPPED_WAIT):
                self._failed = True  # what comes of it later is not told
            raise

    def _attempt(self, action: Callable[[], object]) -> None:
        """Have the worker do it, in order; nothing is done once the store has failed."""
        self._worker.do(lambda: self._guard(action))

    def _guard(self, action: Callable[[], object]) -> None:
        if not self._failed:
            try:
                action()
            except Exception as error:
                self._fail(str(self._error(error)))

    def _fail(self, message: str) -> None:
        if not self._failed:
            self._failed = True
            text = f"{message}; the training goes on, `permafrost track` logs it"
            print(text, file=sys.stderr)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise what the store raises as one line."""
        try:
            self._get_ready()
            yield
        except Exception as error:
            raise self._error(error) from error

    def _get_ready(self) -> None:
        """Do what takes seconds whatever the store does: it counts for no wait."""
        load_mlflow(self.uri)
        file = database_file(self.uri)
        if file and not file.exists():
            with project_lock(self.root, "mlflow", WAIT):  # who creates one at once crashes
                if not file.exists():
                    make_database(file)

    @property
    def _store(self) -> str:
        return f"MLflow at {redact(self.uri, self.uri)}"

    def _error(self, error: Exception) -> "TrackingError":
        # A database says in a few words what SQLAlchemy and MLflow say in many lines.
        origin = getattr(error.__cause__ or error, "orig", None) or error
        line = (str(origin).strip() or type(origin).__name__).splitlines()[0]
        line = re.sub(r".*\(Caused by (.*)\)", r"\1", line)  # where requests tells a long story
        return TrackingError(f"{self._store}: {redact(line, self.uri)[:300]}")

    # The rest may raise whatever MLflow raises; a training has the worker do it.

    def _connect(self) -> "MlflowClient":
        """Return the client; every call into the store begins here."""
        if self._failed:  # nobody waits any more: it would undo what `track` has written
            raise TrackingError("given up")
        if self._client is None:
            from mlflow.tracking import MlflowClient

            if is_database(self.uri):
                refuse_other_schema(self.uri)
            self._client = MlflowClient(self.uri)
            if self._is_own:
                set_artifacts(self.root.resolve() / "mlflow.db", EXPERIMENTS)
        return self._client

    @property
    def _is_own(self) -> bool:
        """Whether the store is the project's own database, whose runs are all its own."""
        file = database_file(self.uri)
        return file is not None and file.resolve() == (self.root / "mlflow.db").resolve()

    def _experiment(self, name: str) -> str:
        """Return the id of an experiment, which is created if need be."""
        if name not in self._experiments:
            found = self._connect().get_experiment_by_name(name)
            if found and found.lifecycle_stage != "active":
                raise TrackingError(self._how_to_restore(name, found.experiment_id))
            number = str(found.experiment_id) if found else self._create_experiment(name)
            if not number:
                raise TrackingError("it answers, but not as MLflow does")
            self._experiments[name] = number
        return self._experiments[name]

    def _how_to_restore(self, name: str, number: str) -> str:
        command = f"mlflow experiments restore --experiment-id {number}"
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            command = f"MLFLOW_TRACKING_URI=sqlite:///mlflow.db {command}"
        return f"its experiment {name} was deleted; restore it by `{command}`"

    def _create_experiment(self, name: str) -> str:
        # A relative default would put artifacts wherever the command happens to run.
        file = database_file(self.uri)
        location = f"{artifacts_folder(file)}/{name}" if file else None
        # Without the kind MLflow's pages take an experiment without traces for one of an agent.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(self._connect().create_experiment(name, location, tags))
        except Exception:
            found = self._connect().get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)  # another process was faster

    def _runs(self, experiment: str, condition: str = "") -> list["Run"]:
        number = self._experiment(experiment)
        runs: list[Run] = []
        token = None
        while True:
            page = self._connect().search_runs(
                [number], condition, max_results=1000, page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _start(self, record: RunRecord, origin: Mapping[str, str] | None = None) -> str:
        from mlflow.entities import Param

        for run in self._runs(record.experiment, f"tags.key = '{record.key}'"):
            if self._owns(run):
                self._connect().delete_run(run.info.run_id)
        tags = record.all_tags | {"project": self.place.here} | dict(origin or {})
        run = self._connect().create_run(
            self._experiment(record.experiment), run_name=record.name, tags=tags
        )
        params = [Param(name, str(value)) for name, value in record.params.items()]
        self._connect().log_batch(run.info.run_id, params=params)
        if "dataset" in record.params:
            self._log_data(run.info.run_id, record)
        return str(run.info.run_id)

    def _log_data(self, run_id: str, record: RunRecord) -> None:
        data = [_data(record.params)]
        try:
            self._connect().log_inputs(run_id, data)
        except Exception:  # another process has just noted the same data set
            with suppress(Exception):  # or the server takes none, which matters to no result
                self._connect().log_inputs(run_id, data)

    def _owns(self, run: "Run") -> bool:
        """Return whether this project has logged a run: others write to the same server."""
        tags = run.data.tags
        return "key" in tags and (self._is_own or tags.get("project") == self.place.here)

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
        from mlflow.entities import RunTag

        # At step 0 MLflow draws a result as a bar beside those of the other runs.
        self._log_curves(run_id, [{"step": 0, **record.metrics}])
        tags = [RunTag(name, value) for name, value in record.all_tags.items()]
        self._connect().log_batch(run_id, tags=tags)
        for place, path in record.pictures.items():
            folder, _, _ = place.rpartition("/")
            self._connect().log_artifact(run_id, str(path), folder or None)
        self._stop(run_id, record.status)

    def _stop(self, run_id: str, status: str) -> None:
        self._connect().set_terminated(run_id, status)

    def _reconcile(
        self, records: Iterable[RunRecord], is_active: Callable[[str], bool], take_over: bool
    ) -> dict[str, int]:
        runs, ended, left = self._sort(take_over)
        counts = {"written": 0, "deleted": 0, "kept": 0} | ({"left": left} if left else {})
        for record in records:
            if record.partial and record.key in ended:
                counts["kept"] += 1
                continue
            found = runs.pop(record.key, [])
            if self._holds(found, record):
                counts["kept"] += 1
            elif not is_active(record.key):
                self._rewrite(record)
                counts["written"] += 1
                counts["deleted"] += len(found)
        for key, found in runs.items():
            for run in found:
                if not _is_whole(run) and not is_active(key) and self._is_left(run):
                    self._connect().delete_run(run.info.run_id)
                    counts["deleted"] += 1
        return counts

    def _sort(self, take_over: bool) -> tuple[dict[str, list["Run"]], set[str], int]:
        """Return the project's runs by key, the keys of all that have ended, and a count.

        That is of the runs which were logged from where else the project's files have been, and are
        not taken over.
        """
        earlier = {*self.place.moved, *self.place.others}
        claimed = earlier if take_over else set(self.place.left())
        runs: dict[str, list[Run]] = {}
        ended, left = set(), 0
        for run in (run for name in EXPERIMENTS for run in self._runs(name)):
            key, project = (run.data.tags.get(name, "") for name in ("key", "project"))
            if project in claimed:
                self._connect().set_tag(run.info.run_id, "project", self.place.here)
            if project in claimed or self._owns(run):
                runs.setdefault(key, []).append(run)
            elif project in earlier:
                left += 1
            if _is_whole(run):
                ended.add(key)
        return runs, ended, left

    def _holds(self, found: list["Run"], record: RunRecord) -> bool:
        """Return whether there is one run, and it holds all of the record."""
        if len(found) != 1 or found[0].info.status != record.status:
            return False
        (run,) = found
        # MLflow's own, such as a note, may have been edited on its page.
        tags = {n: tag for n, tag in record.all_tags.items() if not n.startswith("mlflow.")}
        if not tags.items() <= run.data.tags.items():
            return False
        folders = {place.rpartition("/")[0] for place in record.pictures}
        there = {
            file.path
            for folder in folders
            for file in self._connect().list_artifacts(run.info.run_id, folder or None)
        }
        return record.pictures.keys() <= there

    def _is_left(self, run: "Run") -> bool:
        """Return whether a run that had not ended has not ended since, either."""
        return not _is_whole(self._connect().get_run(run.info.run_id))


class LiveRun:
    """One run under way."""

    def __init__(self, tracker: Tracker, record: RunRecord) -> None:
        self._tracker = tracker
        self._record = record
        self._run_id = ""

    def start(self) -> None:
        """Begin the run."""
        self._tracker._attempt(self._start)

    def log(self, rows: list[Mapping[str, float]]) -> None:
        """Log rows of a curve, each with its ``step``."""
        self._tracker._attempt(lambda: self._tracker._log_curves(self._run_id, rows))

    def finish(self, record: RunRecord) -> None:
        """Log the results and end the run."""
        self._tracker._attempt(lambda: self._tracker._finish(self._run_id, record))

    def stop(self, status: str) -> None:
        """End the run without results."""
        self._tracker._attempt(lambda: self._stop(status))

    def _start(self) -> None:
        origin = _origin(self._tracker.root)
        self._run_id = self._tracker._start(self._record, origin)

    def _stop(self, status: str) -> None:
        if self._run_id:  # or it was never begun
            self._tracker._stop(self._run_id, status)


class TrackingError(Exception):
    """The MLflow store cannot be used."""


def _is_whole(run: "Run") -> bool:
    """Return whether a training came to its end, be it by diverging."""
    diverged = run.info.status == _FAILED and "error" in run.data.tags
    return run.info.status == _FINISHED or diverged


def _origin(root: Path) -> dict[str, str]:
    """Return who trains, where and with which commit checked out, as MLflow's own tags.

    DVC runs a queued experiment in a copy, which has its own commit.
    """
    tags = {"mlflow.source.name": root.resolve().name, "mlflow.source.type": "LOCAL"}
    with suppress(OSError, KeyError):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    command = ["git", "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):  # no git, or no commit
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        tags["mlflow.source.git.commit"] = found.stdout.strip()
    return tags


def _data(params: Mapping[str, Any]) -> "DatasetInput":
    """Return the data set of a run and how it was divided, as MLflow shows it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    about = {n: str(v) for n, v in params.items() if n == "dataset" or n.startswith("split.")}
    text = json.dumps(about, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    data = Dataset(str(params["dataset"]), digest, "permafrost", text)
    return DatasetInput(data, [InputTag("mlflow.data.context", "training")])


def _now() -> int:
    return int(time.time() * 1000)
