"""Every training, stored under the hash of all that it depends on.

A run is trained once, whoever asks for it; one that was killed goes on after its last epoch. The
store lies in ``.permafrost/cells`` at the project's root, outside what DVC owns, and the key keeps
it honest: whatever changes the result changes the key.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from filelock import Timeout

from permafrost.artifacts import require, save_record
from permafrost.errors import DamagedError, InputError
from permafrost.machine import fingerprint
from permafrost.runs.key import is_fresh_wanted, result_key
from permafrost.runs.outcome import OnEpoch, Outcome, row_facts
from permafrost.runs.rows import first_task_row, further_row, row_accuracies
from permafrost.runs.stored import KEPT, MODEL, StoredRuns
from permafrost.strategies import STRATEGIES, Progress
from permafrost.tensors import load_tensors, save_tensors
from permafrost.tracking import (
    FIRST_TASKS,
    RUNS,
    TRIALS,
    LiveRun,
    RunRecord,
    Tracker,
    machine_tags,
)
from permafrost.training import TrainingState, part_of

_CHECKPOINT = "checkpoint.safetensors"

_EXPERIMENTS = {"cell": RUNS, "trial": TRIALS, "first_task": FIRST_TASKS}

Loaded = TypeVar("Loaded")


Train = Callable[[Progress | None, OnEpoch], Outcome]


@dataclass(frozen=True)
class RunRequest:
    """A training that somebody wants.

    Attributes
    ----------
    kind : {"cell", "trial", "first_task"}
        A second-task training, one that is measured on validation images, or the first one that
        they start from.
    name : str
        For people.
    identity : dict
        All that the result depends on besides the code; JSON.
    params : dict
        What MLflow shows of it.
    code : tuple of str
        The modules that the training starts from.
    row : dict
        What its row says of it before it is trained.
    """

    kind: str
    name: str
    identity: dict[str, Any]
    params: dict[str, Any]
    code: tuple[str, ...]
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Return the run's key, 32 hexadecimal digits."""
        return result_key({"kind": self.kind, "identity": self.identity}, self.code)


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A training that was done where the store is not; it can be pickled.

    Attributes
    ----------
    key : str
        Of the run, by the code that trained it.
    request : RunRequest
        Which run.
    outcome : Outcome
        What it has ended with.
    made_on : dict
        The machine's fingerprint.
    """

    key: str
    request: RunRequest
    outcome: Outcome
    made_on: dict[str, str]


class RunStore(StoredRuns):
    """The stored runs of one project.

    Parameters
    ----------
    root : Path
        The project's root.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.tracker = Tracker(root)

    def obtain(
        self,
        request: RunRequest,
        train: Train,
        on_epoch: OnEpoch | None = None,
    ) -> dict[str, Any]:
        """Return a run's record; train the run if it is not stored.

        Parameters
        ----------
        request : RunRequest
            Which run.
        train : callable
            Given the progress to go on from (or None) and what to call after each epoch.
        on_epoch : callable, optional
            Told the progress after each epoch.

        Returns
        -------
        dict
            ``key``, ``kind``, ``name``, ``params``, the facts, and ``row``, derived of them.
        """
        key = request.key
        with self.lock_or_wait(key, request.name):
            if is_fresh_wanted():
                shutil.rmtree(self.folder / key, ignore_errors=True)
                return self._train(request, key, train, None, on_epoch)
            if stored := self._stored(request, key):
                return stored
            progress = self._unless_damaged(self._load_checkpoint, key)
            return self._train(request, key, train, progress, on_epoch)

    def adopt(self, run: FinishedRun) -> dict[str, Any]:
        """Store and log a run that was trained elsewhere, unless it is stored.

        Returns
        -------
        dict
            As of :meth:`obtain`.

        Raises
        ------
        InputError
            If it was trained by other code than is here.
        """
        key = run.key
        if run.request.key != key:
            raise InputError(f"{run.request.name}: was trained by other code than is here")
        with self.lock_or_wait(key, run.request.name):
            if stored := self._stored(run.request, key):
                return stored
            record = self._complete(key, _begun(run.request, key), run.outcome, run.made_on)
            self.tracker.write(run_record(record, run.made_on))
            self._drop_checkpoint(key)
            return with_row(record)

    def _stored(self, request: RunRequest, key: str) -> dict[str, Any] | None:
        """Return the record of a run that is stored whole; None where it is not."""
        stored = self._unless_damaged(self.load, key)
        if stored is None:
            return None
        self._drop_checkpoint(key)
        # One training may be asked for under more than one description.
        return with_row(stored | {"about": request.row})

    def _unless_damaged(self, load: Callable[[str], Loaded | None], key: str) -> Loaded | None:
        """Load something of a run; one that is damaged is told and deleted, to be made again."""
        try:
            return load(key)
        except DamagedError as error:
            print(f"{error.args[0].split(';')[0]}; it is made again", file=sys.stderr)
            shutil.rmtree(self.folder / key)
            return None

    def _train(
        self,
        request: RunRequest,
        key: str,
        train: Train,
        progress: Progress | None,
        on_epoch: OnEpoch | None,
    ) -> dict[str, Any]:
        record, made_on = _begun(request, key), fingerprint()
        with self.tracker.live(run_record(record, made_on)) as run:
            logged = _log_new_epochs(run, progress, 0)

            def after_epoch(progress: Progress) -> None:
                nonlocal logged
                self._save_checkpoint(key, progress)
                logged = _log_new_epochs(run, progress, logged)
                if on_epoch:
                    on_epoch(progress)

            record = self._complete(key, record, train(progress, after_epoch), made_on)
            run.finish(run_record(record, made_on))
        self._drop_checkpoint(key)
        return with_row(record)

    def _drop_checkpoint(self, key: str) -> None:
        """Delete what a whole run needs no more; a kill may have left it."""
        (self.folder / key / _CHECKPOINT).unlink(missing_ok=True)

    def load(self, key: str) -> dict[str, Any] | None:
        """Return a stored run's record, or None where there is none that is whole."""
        result = self.result(key)
        if result is None:
            return None
        for path in (self.model_path(key), self.kept_path(key)):
            require(path.exists(), path, "is missing")
            load_tensors(path)  # it carries its checksum
        record: dict[str, Any] = result["record"]
        return record

    def is_whole(self, key: str) -> bool:
        """Return whether nothing of a run is damaged, as far as it is; one in training is not."""
        try:
            with self.lock(key, timeout=0):
                self.load(key)
                self._load_checkpoint(key)
        except DamagedError:
            return False
        except Timeout:
            return True
        return True

    def run_records(self) -> list[RunRecord]:
        """Return what MLflow has to hold of all whole runs."""
        results = [result for key in self.stored_keys() if (result := self.result(key))]
        return [run_record(result["record"], result["machine"]) for result in results]

    def _complete(
        self, key: str, begun: dict[str, Any], outcome: Outcome, made_on: dict[str, str]
    ) -> dict[str, Any]:
        """Store what a training has ended with; return its record."""
        folder = self.folder / key
        # As it will be read back: JSON has lists only.
        record = begun | json.loads(json.dumps(outcome.facts))
        save_tensors(folder / MODEL, outcome.weights, outcome.about)
        save_tensors(folder / KEPT, outcome.kept)
        result = {"record": record, "seconds": round(outcome.seconds, 3), "machine": made_on}
        # Written last: a run is whole if and only if this file exists.
        save_record(self.result_path(key), result)
        return record

    def _save_checkpoint(self, key: str, progress: Progress) -> None:
        tensors = {f"training/{name}": t for name, t in progress.training.tensors.items()}
        tensors |= {f"start/{name}": t for name, t in progress.start.items()}
        tensors |= {f"memory/{name}": t for name, t in progress.memory.items()}
        about = {
            "learned": progress.learned,
            "rows": [row_facts(row) for row in progress.rows],
            "history": progress.history,
            "epoch": progress.training.epoch,
            "training_history": progress.training.history,
            "phase": progress.phase,
            "seconds": progress.seconds,
            "training_seconds": progress.training.seconds,
        }
        save_tensors(self.folder / key / _CHECKPOINT, tensors, about)

    def _load_checkpoint(self, key: str) -> Progress | None:
        path = self.folder / key / _CHECKPOINT
        if not path.exists():
            return None
        tensors, about = load_tensors(path)
        training, start, memory = (
            part_of(tensors, prefix) for prefix in ("training/", "start/", "memory/")
        )
        return Progress(
            learned=about["learned"],
            rows=[row_accuracies(row) for row in about["rows"]],
            start=start,
            training=TrainingState(
                about["epoch"], training, about["training_history"], about["training_seconds"]
            ),
            history=about["history"],
            memory=memory,
            phase=about["phase"],
            seconds=about["seconds"],
        )


def _begun(request: RunRequest, key: str) -> dict[str, Any]:
    """Return the record of a run before it is trained."""
    return {
        "key": key,
        "kind": request.kind,
        "name": request.name,
        "params": request.params,
        "about": request.row,
    }


def with_row(record: dict[str, Any]) -> dict[str, Any]:
    """Add to a stored record what follows from it, unless it has that, or is only begun."""
    if "row" in record or "history" not in record:
        return record
    derive = first_task_row if record["kind"] == "first_task" else further_row
    return record | {"row": {"key": record["key"]} | record["about"] | derive(record)}


def run_record(
    record: dict[str, Any], made_on: Mapping[str, str], *, partial: bool = False
) -> RunRecord:
    """Return what MLflow holds of a run, finished or only begun, and of the machine it is from."""
    row = with_row(record).get("row", {})
    return RunRecord(
        key=record["key"],
        experiment=_EXPERIMENTS[record["kind"]],
        name=record["name"],
        params=record["params"],
        metrics={
            name: value
            for name, value in row.items()
            if isinstance(value, float | int) and name not in record["params"]
        },
        curves=_curves(record.get("history", [])),
        tags={"kind": record["kind"], "mlflow.note.content": _note(record)} | machine_tags(made_on),
        error=row.get("error"),
        partial=partial,
    )


def _note(record: dict[str, Any]) -> str:
    """Return what a run is, in a line."""
    about = record.get("about", record.get("row", {}))
    name = about.get("strategy")
    if name is None:
        return "The first task, from which all strategies go on."
    what = (STRATEGIES[name].__doc__ or "").partition("\n")[0] if name in STRATEGIES else ""
    note = what or f"The strategy {name} of the project's own."
    control = about.get("twin") or ("chance" if about.get("metric") == "random" else None)
    return f"{note} A control: {control} in the explanation's place." if control else note


def _curves(history: list[dict[str, Any]]) -> list[Mapping[str, float]]:
    """Number the epochs of all tasks through; an accuracy's curve has a name of its own."""
    return [
        {"step": step}
        | {
            f"epoch_{name}": value
            for name, value in row.items()
            if name not in ("epoch", "task", "phase")
        }
        for step, row in enumerate(history, start=1)
    ]


def _log_new_epochs(run: LiveRun, progress: Progress | None, logged: int) -> int:
    if progress is None:
        return logged
    rows = _curves(progress.history + progress.training.history)
    run.log(rows[logged:])
    return len(rows)
