"""Commands around the workflow: bring MLflow up to date, show it, delete old trainings."""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from permafrost.artifacts import load_record
from permafrost.curves import VIEW, curves_view
from permafrost.errors import InputError
from permafrost.outputs import curves_of_outputs, runs_of_outputs
from permafrost.paths import cached_files, project_root
from permafrost.processes import stop_group
from permafrost.runs.results import results_folder
from permafrost.runs.store import RunStore
from permafrost.stages.shared import (
    FIRST_RECORDS,
    SECOND_RECORDS,
    SWEEP,
    TRIALS,
    read_params,
    seed_file,
)
from permafrost.tracking import CURVES, Tracker, TrackingError, redact
from permafrost.variants import variant_records


def track_all(*, take_over: bool = False) -> str:
    """Make MLflow hold one finished run for each training, variant and curve; return what was done.

    Parameters
    ----------
    take_over : bool
        Whether the runs that were logged from where else this folder has been become its own.

    Raises
    ------
    InputError
        If the store cannot be used.
    """
    store = RunStore(project_root())
    records = store.run_records() + variant_records(store.root)
    records += runs_of_outputs(store.root, {record.key for record in records})
    try:
        counts = store.tracker.reconcile(records, store.is_active, take_over=take_over)
        store.tracker.reconcile(curves_of_outputs(store.root), store.is_active)
    except TrackingError as error:
        raise InputError(str(error)) from None
    done = "MLflow: " + ", ".join(f"{count} runs {what}" for what, count in counts.items())
    if "left" in counts:
        place = store.tracker.place
        done += f" to {', '.join([*place.moved, *place.others])}, of which this folder is a copy; "
        done += "if it is the project itself, moved: `permafrost track --take-over`"
    return done


def unused_runs() -> list[str]:
    """Return the keys of the stored trainings that no result names.

    The results are those in ``metrics/`` and, as far as they are in DVC's cache, those of all
    commits, branches, tags and experiments.

    Raises
    ------
    InputError
        If a result is missing that would name trainings: a stage is under way or was stopped.
    """
    store = RunStore(project_root())
    stored = store.stored_keys()
    if any(store.is_active(key) for key in stored):
        raise InputError("a training is under way; run `permafrost gc` once it has ended")
    used: set[str] = set()
    if stored:
        folders, seeds = (FIRST_RECORDS, SECOND_RECORDS), read_params().seeds
        wanted = {SWEEP, *(seed_file(folder, s, ".json") for folder in folders for s in seeds)}
        for path in sorted(wanted.union(*(folder.glob("*.json") for folder in folders))):
            rows: Any = load_record(path)
            used |= {row["key"] for row in (rows if isinstance(rows, list) else [rows])}
        used |= {row["key"] for row in load_record(TRIALS)["trials"]}
        for path in _committed_results(store.root):
            used |= set(re.findall(r'"key": "([0-9a-f]{32})"', path.read_text()))
    return [key for key in stored if key not in used]


def _committed_results(root: Path) -> Iterator[Path]:
    """Find the results that any ``dvc.lock`` in git names; experiments are commits, too."""

    def git(*arguments: str, given: str = "") -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, input=given, capture_output=True, text=True, check=True
        ).stdout

    try:
        versions = git("rev-list", "--all", "--objects", "--", "dvc.lock")
        blobs = [line.split()[0] for line in versions.splitlines() if line.endswith("dvc.lock")]
        notes = git("cat-file", "--batch", given="\n".join(blobs))
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"git: cannot tell what other commits use ({error})") from None
    cache = cached_files(root)
    named = re.findall(r"path: metrics/\S+\.json\n\s+hash: md5\n\s+md5: ([0-9a-f]{32})", notes)
    for digest in sorted(set(named)):
        path = cache / digest[:2] / digest[2:]
        if path.exists():
            yield path


def describe_runs(keys: list[str]) -> list[str]:
    """Return a line for each stored training: its key, and its name if it is whole."""
    store = RunStore(project_root())
    return [f"{key}  {store.name(key)}" for key in keys]


def delete_runs(keys: list[str]) -> str:
    """Delete stored trainings, but none that is under way; return what was done.

    What the stages that explain and rank have kept goes too: they make it again if it is needed.
    """
    store = RunStore(project_root())
    shutil.rmtree(results_folder(store.root), ignore_errors=True)
    freed = [size for key in keys if (size := store.delete(key)) is not None]
    return f"{len(freed)} trainings deleted, {sum(freed) / 2**20:.0f} MiB freed"


def serve_ui(port: int) -> int:
    """Run MLflow's server on this machine's loopback address until it is stopped.

    Where MLFLOW_TRACKING_URI names a server, that one has the pages.

    Returns
    -------
    int
        The server's exit code.

    Raises
    ------
    InputError
        If the store cannot be used, or the port is another program's.
    """
    tracker = Tracker(project_root())
    try:
        experiment = tracker.experiment_id(CURVES)
    except TrackingError as error:
        raise InputError(str(error)) from None
    path = f"#/experiments/{experiment}/runs?compareRunsMode=CHART"
    with suppress(TrackingError):  # a server may not let everybody save a view
        tracker.save_view(CURVES, VIEW, curves_view())
        path += f"&viewStateShareKey={VIEW}"
    if tracker.uri.startswith("http"):
        print(f"Compare the runs at {redact(tracker.uri, tracker.uri).rstrip('/')}/{path}")
        return 0
    _refuse_taken(port)
    page = f"http://127.0.0.1:{port}/{path}"
    print("MLflow starts ...", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--default-artifact-root", str(tracker.root / "mlruns")]
    command += ["--uvicorn-opts", "--log-level warning"]  # or each request buries the address
    # Not among the arguments, which everybody on this machine can read.
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": tracker.uri,
        "PYTHONWARNINGS": "ignore",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    }
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the server must not be left over
        signal.signal(number, signal.default_int_handler)
    # A group of its own: the server's processes do not all end with the first of them.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        if _answers(server, port):
            print(f"Compare the runs at {page} (Ctrl-C ends the server)", flush=True)
        return server.wait()
    finally:
        stop_group(server)


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a server answers; return whether it does, or has ended before."""
    while server.poll() is None:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        time.sleep(0.3)
    return False


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is taken by another program" if taken else f"cannot be used ({error.strerror})"
            raise InputError(
                f"--port: {port} {why}; choose another: `permafrost ui --port NUMBER`"
            ) from None
