"""Which MLflow store a root uses, whether it can be used, and the checkpoint of a registered model."""

import logging
import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from r1pipe.config import ParentRef
from r1pipe.core.errors import CheckpointError, EnvironmentProblem
from r1pipe.core.redaction import without_login, without_secrets
from r1pipe.runs.locks import flock

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

VARIABLE = "MLFLOW_TRACKING_URI"  # conf/tracking/mlflow.yaml takes tracking.uri from it
PATIENCE_S = 5.0  # for a tracking server to answer at the start
LOCK = ".mlflow.lock"  # in the root: held while the store, an experiment or a run is created
BUSY_S = 60.0  # how long SQLite waits for another process's transaction
ARTIFACTS = "mlartifacts"
QUIET = {  # read by mlflow when it is imported
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # errors reach us as exceptions; shown in one line, without traceback
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def store_uri(root: Path | str, uri: str | None = None) -> str:
    """The tracking store: `uri`, or SQLite under `root`."""
    return uri or f"sqlite:///{Path(root).resolve() / 'mlflow.db'}"


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def matching(key: str, value: str) -> str:
    """`key = value` in MLflow's filter language. Raises EnvironmentProblem for a value it cannot quote."""
    quote = '"' if "'" in value else "'"
    if quote in value:
        raise EnvironmentProblem(
            f"MLflow cannot search for {value}: it has both kinds of quotes; rename it, or run without: "
            "tracking=none"
        )
    return f"{key} = {quote}{value}{quote}"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def failures() -> tuple[type[Exception], ...]:
    """Errors of a store that is gone, locked, full or refuses us, and of a run that cannot be written."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # a database's driver may be missing; a record may be broken
    databases = (SQLAlchemyError, sqlite3.Error, CommandError)
    return MlflowException, *databases, OSError, ImportError, CheckpointError


def check_server_answers(uri: str) -> None:
    """Raises EnvironmentProblem if `uri` is a server that does not answer; needs no mlflow."""
    if not is_server(uri):
        return
    try:
        urllib.request.urlopen(f"{without_login(uri).rstrip('/')}/health", timeout=PATIENCE_S).close()
    except urllib.error.HTTPError:
        return  # it answers; the first call will show whether it is MLflow and lets us in
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"no MLflow server at {described(uri)} ({first_line(error)}); start it, give tracking.uri=null, "
            "or run without: tracking=none"
        ) from error


def described(uri: str) -> str:
    """The key, its value without a login, and where it comes from."""
    origin = f" (from {VARIABLE})" if uri == os.environ.get(VARIABLE) else ""
    return f"tracking.uri={without_login(uri)}{origin}"


def connect(uri: str) -> "MlflowClient":
    """A quiet client. Raises EnvironmentProblem, in one line, for a store that cannot be used."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    check_server_answers(uri)
    from mlflow.tracking import MlflowClient

    disable_fsync()
    logging.getLogger("alembic").setLevel(logging.WARNING)  # mlflow's import has set it to INFO
    try:
        prepare(uri)
        client = MlflowClient(uri, uri)
        client.search_experiments(max_results=1)  # a store opens its database at the first call
    except failures() as error:
        reason = without_secrets(first_line(error))
        path = file_of(uri)
        remedy = f"move {path} away and `r1pipe sync` rebuilds it" if path and path.is_file() else "fix it"
        raise EnvironmentProblem(
            f"MLflow cannot use {described(uri)}: {reason}; {remedy}, or run without: tracking=none"
        ) from error
    return client


def check_exists(store: str, error: Exception) -> None:
    """Raise `error` where the store's database is missing: a client would create it."""
    path = file_of(store)
    if path is not None and not path.exists():
        raise error


def resolve_model(address: str, root: Path | str, uri: str | None = None) -> ParentRef:
    """The checkpoint behind `models:/name@alias` or `models:/name/version`, as it was registered.

    Raises CheckpointError when there is no such version, EnvironmentProblem when the store cannot be used.
    """
    name, at, alias = address.removeprefix("models:/").partition("@")
    name, _, version = name.partition("/")
    if not name or not (alias or version):
        raise CheckpointError(f"{address}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    store = store_uri(root, uri)
    check_exists(store, CheckpointError(f"{address}: no MLflow store under {root} yet"))
    client = connect(store)
    from mlflow.exceptions import MlflowException

    try:
        if at:
            model_version = client.get_model_version_by_alias(name, alias)
        else:
            model_version = client.get_model_version(name, version)
    except MlflowException as error:
        try:
            aliases = sorted(client.get_registered_model(name).aliases)
            existing = ", ".join(f"models:/{name}@{alias}" for alias in aliases) or "no alias of this name"
        except MlflowException:
            existing = "none of this name"
        raise CheckpointError(f"{address}: {first_line(error)}; known: {existing}") from error
    keys = ("stage", "run_id", "checkpoint", "checkpoint_hash")
    return ParentRef(*(model_version.tags.get(key, "") for key in keys))


# --- the SQLite file of the default store
#
# MLflow itself creates its tables in several hundred statements, without a lock: of two processes that start
# together one fails, and a kill in between leaves a database that no version of MLflow can open.


def artifact_folder(root: Path | str) -> Path:
    """Where artifacts are stored, without a server."""
    return Path(root).resolve() / ARTIFACTS


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Let one process at a time create something in the root's store."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("w") as file:
        flock(file)
        yield


def file_of(uri: str) -> Path | None:
    """The file of a SQLite store; None for a server or another database."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path) if uri.startswith("sqlite:///") and path != ":memory:" else None


def prepare(uri: str) -> None:
    """Create the database where it is missing or incomplete, and follow a root that was moved.

    Does nothing for other stores. Raises OSError, sqlite3.Error and MLflow's errors.
    """
    path = file_of(uri)
    if path is None:
        return
    if not is_whole(path):
        with locked(path.parent):
            if not is_whole(path):  # another process may have created it meanwhile
                create(path)
    # correct the absolute addresses that MLflow keeps of artifacts, where they moved with the database
    here = artifact_folder(path.parent)
    with closing(sqlite3.connect(path, timeout=BUSY_S)) as database, database:
        locations = database.execute(
            "SELECT artifact_location FROM experiments"
            " WHERE artifact_location LIKE ? AND artifact_location != ?",
            (f"%/{ARTIFACTS}", here.as_uri()),
        ).fetchall()
        for (old,) in locations:
            runs = database.execute("SELECT run_uuid FROM runs WHERE instr(artifact_uri, ?) = 1", (old,))
            if not any((here / run_id).exists() for (run_id,) in runs):
                continue  # a store of several roots, each with its own artifacts
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE instr({column}, ?) = 1",
                    (here.as_uri(), len(old) + 1, old),
                )


def is_whole(path: Path) -> bool:
    """Whether MLflow finished creating the tables: it adds the experiment Default last."""
    if not path.is_file():
        return False
    with closing(sqlite3.connect(path, timeout=BUSY_S)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" in tables:
            return database.execute("SELECT 1 FROM experiments").fetchone() is not None
    return bool(tables) and "_alembic_tmp_experiments" not in tables


def create(path: Path) -> None:
    """Create the database under another name and rename it, so that a kill changes nothing."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temporary = path.with_name(f"{path.name}.partial")
    for leftover in path.parent.glob(f"{temporary.name}*"):
        leftover.unlink()
    disable_fsync()
    store = SqlAlchemyStore(f"sqlite:///{temporary}", artifact_folder(path.parent).as_uri())
    store.engine.dispose()
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)  # of the database that it replaces
    temporary.replace(path)


@cache
def disable_fsync() -> None:
    """Let SQLite commit without fsync, which makes creating the tables faster (2 s instead of 8 s).

    A power cut may then damage mlflow.db; `sync` rebuilds it from the run folders.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def on_connect(connection: object, _record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", on_connect)
