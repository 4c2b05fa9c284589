"""Which MLflow store, whether it can be used, and what is asked of it from outside a run."""

import ipaddress
import logging
import os
import socket
import sqlite3
import sys
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from r1pipe.config import RunConfig
from r1pipe.core.errors import CheckpointError, EnvironmentProblem
from r1pipe.core.redaction import without_login, without_secrets

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LOOPBACK = "127.0.0.1"
PATIENCE_S = 5.0  # a tracking server that does not answer within this time at start is refused
QUIET = {  # read by mlflow when it is imported
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # errors reach us as exceptions; told in one line, not as a traceback
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


def artifact_folder(root: Path | str) -> Path:
    """Where artifacts go unless a server keeps them."""
    return Path(root).resolve() / "mlartifacts"


def matching(key: str, value: str) -> str:
    """A comparison in MLflow's filter language. Raises EnvironmentProblem for a name that none fits."""
    quote = '"' if "'" in value else "'"
    if quote in value:
        raise EnvironmentProblem(
            f"MLflow cannot look for {value}: a name with both kinds of quotes; rename it"
        )
    return f"{key} = {quote}{value}{quote}"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def failures() -> tuple[type[Exception], ...]:
    """What is raised by a store that is gone, locked, full or refuses us, or a run that cannot be written."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # a database's driver may be missing; a record may be broken
    return MlflowException, SQLAlchemyError, OSError, ImportError, CheckpointError


def check_tracking(config: RunConfig) -> None:
    """Raises EnvironmentProblem where a run is to be tracked by a server that does not answer."""
    if config.tracking.enabled:
        check_server_answers(store_uri(config.root, config.tracking.uri))


def check_server_answers(uri: str) -> None:
    """Raises EnvironmentProblem if `uri` is a server that does not answer; needs no mlflow."""
    if not is_server(uri):
        return
    try:
        urllib.request.urlopen(f"{without_login(uri).rstrip('/')}/health", timeout=PATIENCE_S).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it is MLflow, and lets us in, shows with the first call
    except (OSError, ValueError) as error:
        problem = f"no MLflow server at tracking.uri={without_login(uri)} ({first_line(error)})"
        raise EnvironmentProblem(
            f"{problem}; start it, leave tracking.uri=null, or run without: tracking=none"
        ) from error


def connect(uri: str) -> "MlflowClient":
    """A quiet client. Raises EnvironmentProblem, in one line, for a store that cannot be used."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    check_server_answers(uri)
    from mlflow.tracking import MlflowClient

    _do_not_wait_for_the_disk()
    logging.getLogger("alembic").setLevel(logging.WARNING)  # mlflow's import has set it to INFO
    try:
        client = MlflowClient(uri, uri)
        client.search_experiments(max_results=1)  # a store opens its database at the first call
    except failures() as error:
        shown, reason = without_login(uri), without_secrets(first_line(error))
        raise EnvironmentProblem(
            f"MLflow cannot use tracking.uri={shown}: {reason}; mend it, or run without: tracking=none"
        ) from error
    return client


@cache
def _do_not_wait_for_the_disk() -> None:
    """SQLite commits without fsync, which takes most of the time of making MLflow's tables (8 s to 2 s).

    A power cut may then damage mlflow.db; it is an index, and `sync` makes it again from the run folders.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def connected(connection: object, _record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", connected)


def resolve_model(address: str, root: Path | str, uri: str | None = None) -> Path:
    """The checkpoint folder behind `models:/name@alias` or `models:/name/version`.

    Raises CheckpointError when there is no such version or its checkpoint is not on this machine,
    EnvironmentProblem when the store cannot be used.
    """
    name, at, alias = address.removeprefix("models:/").partition("@")
    name, _, version = name.partition("/")
    if not name or not (alias or version):
        raise CheckpointError(f"{address}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    store = store_uri(root, uri)
    _check_exists(store, CheckpointError(f"{address}: no MLflow store under {root} yet"))
    client = connect(store)
    from mlflow.exceptions import MlflowException

    try:
        if at:
            found = client.get_model_version_by_alias(name, alias)
        else:
            found = client.get_model_version(name, version)
    except MlflowException as error:
        known = _known_addresses(client, name)
        raise CheckpointError(f"{address}: {first_line(error)}; known: {known}") from error
    checkpoint = found.tags.get("checkpoint")
    if not checkpoint or not Path(checkpoint).is_dir():
        raise CheckpointError(f"{address}: its checkpoint {checkpoint or ''} is not on this machine")
    return Path(checkpoint)


def _known_addresses(client: "MlflowClient", name: str) -> str:
    models = client.search_registered_models(f"name = '{name}'")
    aliases = sorted(models[0].aliases) if models else []
    return ", ".join(f"models:/{name}@{alias}" for alias in aliases) or "none of this name"


def _check_exists(store: str, error: Exception) -> None:
    """A client would make the missing database; who only reads wants to be told."""
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        raise error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name: no promise
        return False


def serve_ui(root: Path | str, port: int, host: str = LOOPBACK, uri: str | None = None) -> NoReturn:
    """Becomes MLflow's server, so that a signal reaches it and nothing stays behind.

    Raises EnvironmentProblem when there is nothing to serve, the store is a server and has its own UI,
    or the port is taken.
    """
    store = store_uri(root, uri)
    if is_server(store):
        raise EnvironmentProblem(
            f"tracking.uri is a server with a UI of its own: open {without_login(store)}"
        )
    _check_exists(
        store, EnvironmentProblem(f"no MLflow store under {root} yet; `r1pipe reproduce` makes one")
    )
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise EnvironmentProblem(f"{host}:{port}: {error.strerror}; give another --port") from error
    if not is_loopback(host):
        print(
            f"warning: whoever reaches {host}:{port} can read, change and delete all runs: MLflow asks for no"
            " password",
            file=sys.stderr,
        )
    print(f"MLflow's UI: http://{host}:{port} (Ctrl-C ends it)", flush=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += ["--backend-store-uri", store, "--default-artifact-root", artifact_folder(root).as_uri()]
    command += ["--uvicorn-opts", "--log-level warning"]
    os.execve(sys.executable, command, {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ})
