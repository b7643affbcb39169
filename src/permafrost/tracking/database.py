"""What MLflow needs before it is called: its imports, and a database of its own version."""

import logging
import os
import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from functools import cache
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

from permafrost.imports import require_workflow, uncollected

_SQL = ("sqlite", "postgresql", "mysql", "mssql")

_ARTIFACTS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
)

# One call ends within a minute, by MLflow's own error.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}


@cache
def load_mlflow(uri: str) -> None:
    """Import all that MLflow needs of itself for a store, which it would do bit by bit.

    Raises
    ------
    InputError
        If MLflow is not installed.
    """
    require_workflow("mlflow")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with uncollected():
        import_module("mlflow.tracking")
        if is_database(uri):
            import_module("mlflow.store.tracking.sqlalchemy_store")
            import_module("alembic.script")
    # It would tell every failure besides, at length.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)


def make_database(path: Path) -> None:
    """Make a new database, which is there as a whole or not at all."""
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    engine = sqlalchemy.create_engine(database_uri(part))
    try:
        _initialize_tables(engine)
        engine.dispose()
        part.replace(path)
    finally:
        engine.dispose()
        for left in path.parent.glob(f"{part.name}*"):  # after a full disk, a journal too
            left.unlink()


def is_database(uri: str) -> bool:
    """Return whether a tracking URI names a database, not a server or a folder."""
    return bool(re.match(rf"({'|'.join(_SQL)})[+:]", uri))


def database_uri(path: Path) -> str:
    """Return the URI of a SQLite database, whatever letters its path has."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"


def database_file(uri: str) -> Path | None:
    """Return the file of a plain SQLite URI."""
    found = re.fullmatch("sqlite:///((?!:memory:|file:)[^?]+)", uri)
    return Path(unquote(found[1])) if found else None


def artifacts_folder(database: Path) -> str:
    """Return where a database's artifacts lie: beside it."""
    return (database.resolve().parent / "mlruns").as_uri()


def set_artifacts(database: Path, experiments: Iterable[str]) -> None:
    """Let a database find the artifacts beside it, though it was copied or moved there with them.

    MLflow notes absolute places, and no others, for its experiments, runs and models.
    """
    here = artifacts_folder(database)
    with closing(sqlite3.connect(database)) as store, store:
        noted = dict(store.execute("SELECT name, artifact_location FROM experiments"))
        made = {noted[name].removesuffix(f"/{name}") for name in experiments if noted.get(name)}
        for there in (place for place in made - {here} if re.match("file:.*/mlruns$", place)):
            for table, column in _ARTIFACTS:
                store.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE substr({column}, 1, ?) = ?",
                    (here, len(there) + 1, len(there) + 1, f"{there}/"),
                )


def refuse_other_schema(uri: str) -> None:
    """Raise if a database is of another MLflow, which would upgrade it without asking.

    MLflow tries a database that cannot be opened for minutes, too; this does not.
    """
    import sqlalchemy
    from alembic.migration import MigrationContext
    from mlflow.store.db.utils import _get_latest_schema_revision

    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()
    if found not in (None, _get_latest_schema_revision()):
        raise ValueError(
            "its database is of another version of MLflow; back it up and run `mlflow db upgrade`"
        )
