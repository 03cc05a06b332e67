"""The one place that knows where MLflow is and how to talk to it without noise."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from qsweep.errors import SpecError, TrackError
from qsweep.study.folder import sqlite_url

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
_DEFAULT = "sqlite:///mlflow.db"
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_BATCH = 100
"""Params that MLflow takes in one call."""
_RETRIES, _TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"


def tracking_uri(uri: str | None, root: Path, name: str = "track.uri") -> str:
    """Where MLflow keeps its runs: `uri`, else `MLFLOW_TRACKING_URI`, else `mlflow.db` in `root`; always absolute.

    Raises SpecError for a URI that MLflow cannot write to, which calls `uri` by its `name`.
    """
    named = name if uri else "MLFLOW_TRACKING_URI"
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT
    scheme = uri.partition(":")[0].split("+")[0].lower()
    if scheme not in SCHEMES or "://" not in uri:
        raise SpecError(
            f"`{named}`: must start with one of {', '.join(SCHEMES)}, like `sqlite:///mlflow.db` (got `{uri}`)"
        )
    if scheme != "sqlite":
        return uri
    _, mark, query = uri.partition("?")
    return sqlite_url((root / _database(uri)).resolve()) + mark + query


def sqlite_path(uri: str) -> Path | None:
    """The database file of an absolute sqlite URI, None for any other."""
    return Path(_database(uri)) if uri.startswith("sqlite") else None


def _database(uri: str) -> str:
    return unquote(uri.partition(":///")[2].partition("?")[0])


def portable(uri: str, root: Path) -> str:
    """`uri` as it is kept for later: that of the default database is relative to `root`, which may be moved."""
    return _DEFAULT if uri == sqlite_url(root.resolve() / "mlflow.db") else uri


@contextmanager
def impatient(seconds: int = 10) -> Iterator[None]:
    """Let MLflow give up on a server that does not answer: within seconds, as a sweep must not wait minutes for it;
    `seconds` is how long one answer may take."""
    patience = {_RETRIES: "1", _TIMEOUT: str(seconds)}
    before = {name: os.environ.get(name) for name in patience}
    os.environ.update({name: value for name, value in patience.items() if before[name] is None})
    try:
        yield
    finally:
        for name in [name for name, value in before.items() if value is None]:
            os.environ.pop(name, None)


def connect(uri: str) -> MlflowClient:
    """A client of `uri` (absolute), its database made and migrated. Raises TrackError where nothing answers.

    Only this client is used, never the fluent API: its stack of runs belongs to one thread.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with answering(uri), impatient(), _alone(uri):
        from mlflow import MlflowClient

        for name in ("alembic", "mlflow"):  # a new database tells of every migration
            logging.getLogger(name).setLevel(logging.ERROR)
        if (database := sqlite_path(uri)) is not None:
            _see_to(database)
        client = MlflowClient(uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client


def _see_to(database: Path) -> None:
    """See that there is a database. It has another name until it is whole: MLflow cannot mend one that is not."""
    if not database.exists():
        unfinished = database.with_name(f"{database.name}.unfinished")
        for path in database.parent.glob(f"{unfinished.name}*"):
            path.unlink()
        make(unfinished)
        os.replace(unfinished, database)
    with suppress(sqlite3.Error):  # write-ahead logging halves the time of a trial; some file systems have none
        connection = sqlite3.connect(database, timeout=10)
        connection.execute("PRAGMA journal_mode=WAL")
        _follow(connection, database)
        connection.close()


def make(database: Path) -> None:
    """A new database, by all migrations there ever were."""
    from mlflow import MlflowClient

    MlflowClient(sqlite_url(database)).search_experiments(max_results=1)


def _follow(connection: sqlite3.Connection, database: Path) -> None:
    """Where artifacts were moved or copied with their database, as a folder of a project is, name them where they lie
    now: MLflow keeps absolute paths, and would go on with the old ones."""
    experiments = connection.execute("SELECT name, artifact_location FROM experiments").fetchall()
    for name, old in experiments:
        new = _artifacts(database, name)
        ours = old.endswith(new.removeprefix(database.parent.as_uri()))
        if old == new or not ours or not (database.parent / "mlartifacts" / name).is_dir():
            continue
        for table, column in _LOCATIONS:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                (new, len(old) + 1, len(old) + 1, f"{old}/"),
            )
    connection.commit()


_LOCATIONS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "storage_location"))


def _artifacts(database: Path, experiment: str) -> str:
    return (database.parent / "mlartifacts" / experiment).as_uri()


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn what MLflow, its database and its network raise into TrackError."""
    try:
        yield
    except Exception as error:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        if not isinstance(error, MlflowException | SQLAlchemyError | OSError | ImportError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrackError(f"MLflow at `{uri}` must answer ({reason[:300]})") from error


def experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment `name`, made if there is none. Artifacts of a sqlite store lie beside it."""
    found = client.get_experiment_by_name(name)
    if found is None:
        database = sqlite_path(uri)
        where = _artifacts(database, name) if database else None
        return client.create_experiment(name, where, {"mlflow.experimentKind": "custom_model_development"})
    if found.lifecycle_stage != "active":
        raise TrackError(
            f"experiment `{name}` at `{uri}` must not be deleted: restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`, or set `track.experiment`"
        )
    return str(found.experiment_id)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time makes and migrates a sqlite database: of six at once, five crashed."""
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def log_all(
    client: MlflowClient,
    run_id: str,
    params: Mapping[str, object] | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
    at: int | None = None,
) -> None:
    """Log all of it to a run, of the time `at` (milliseconds since 1970), by default now."""
    from mlflow.entities import Metric, Param, RunTag

    at = at or now()
    flat_params = [Param(name, str(value)) for name, value in (params or {}).items()]
    client.log_batch(
        run_id,
        [Metric(name, value, at, 0) for name, value in (metrics or {}).items()],
        flat_params[:_BATCH],
        [RunTag(name, value) for name, value in (tags or {}).items()],
    )
    for first in range(_BATCH, len(flat_params), _BATCH):
        client.log_batch(run_id, params=flat_params[first : first + _BATCH])


def now() -> int:
    """Milliseconds since 1970."""
    return int(1000 * time.time())
