"""Where a study is kept: by default an SQLite file of the sweep's own, else what a URL names."""

import re
import sqlite3
import uuid
from functools import partial
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, RDBStorage


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Open a storage, or make it. Raises whatever the data base's driver raises.

    Args:
        url: as SQLAlchemy and Optuna read it; None: a file in `folder`.
    """
    if url is not None:
        return optuna.storages.get_storage(url)
    # A URL would be changed by characters of the path that mean something to Optuna or SQLAlchemy.
    connect = partial(_connect, private(folder))
    storage = RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect})
    return optuna.storages.get_storage(storage)


def close_storage(storage: BaseStorage) -> None:
    """Close the connections to a storage.

    SQLite then moves the content of its write-ahead log (study.db-wal) into study.db, which can be
    copied alone, unless another program has the file open.
    """
    storage.remove_session()
    backend = getattr(storage, "_backend", storage)  # Optuna wraps it in a cache
    if isinstance(backend, RDBStorage):
        backend.engine.dispose()


def private(folder: Path) -> Path:
    """The file that a sweep keeps its study in by default."""
    return folder / "study.db"


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that waits for the disk less often than eight times for each trial.

    A driver that is killed loses nothing; a machine that loses power loses the last moments, but
    the file stays whole.
    """
    connection = sqlite3.connect(path, check_same_thread=False)  # a pool hands them out
    connection.execute("PRAGMA journal_mode=WAL").close()
    connection.execute("PRAGMA synchronous=NORMAL").close()
    return connection


def owner_of(folder: Path) -> str:
    """Whose trials are this folder's, in a storage that others use too.

    A random name in a file of the folder: it goes where the folder goes.
    """
    path = folder / "owner"
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="ascii")
    return path.read_text(encoding="ascii")


def without_password(url: str | None) -> str | None:
    """A storage's URL as it may be shown."""
    return url and re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)
