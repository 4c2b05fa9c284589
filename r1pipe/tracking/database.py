"""The SQLite database of the default store: created atomically, by one process.

MLflow itself creates its tables in several hundred statements, without a lock: of two processes that start
together one fails, and a kill in between leaves a database that no version of MLflow can open.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from r1pipe.runs.locks import flock

LOCK = ".mlflow.lock"  # in the root: held while the store, an experiment or a run is created
BUSY_S = 60.0  # how long SQLite waits for another process's transaction
ARTIFACTS = "mlartifacts"


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
