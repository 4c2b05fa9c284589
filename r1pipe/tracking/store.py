"""Which MLflow store a root uses, whether it can be used, and the checkpoint of a registered model."""

import logging
import os
import sqlite3
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from r1pipe.config import ParentRef
from r1pipe.core.errors import CheckpointError, EnvironmentProblem
from r1pipe.core.redaction import without_login, without_secrets
from r1pipe.tracking import database

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

VARIABLE = "MLFLOW_TRACKING_URI"  # conf/tracking/mlflow.yaml takes tracking.uri from it
PATIENCE_S = 5.0  # for a tracking server to answer at the start
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

    database.disable_fsync()
    logging.getLogger("alembic").setLevel(logging.WARNING)  # mlflow's import has set it to INFO
    try:
        database.prepare(uri)
        client = MlflowClient(uri, uri)
        client.search_experiments(max_results=1)  # a store opens its database at the first call
    except failures() as error:
        reason = without_secrets(first_line(error))
        path = database.file_of(uri)
        remedy = f"move {path} away and `r1pipe sync` rebuilds it" if path and path.is_file() else "fix it"
        raise EnvironmentProblem(
            f"MLflow cannot use {described(uri)}: {reason}; {remedy}, or run without: tracking=none"
        ) from error
    return client


def check_exists(store: str, error: Exception) -> None:
    """Raise `error` where the store's database is missing: a client would create it."""
    path = database.file_of(store)
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
