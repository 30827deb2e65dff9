"""Where a study is kept: by default an SQLite file of the sweep's own, else what a URL names."""

import re
import sqlite3
import uuid
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage


class _Connection(sqlite3.Connection):
    """Waits for the disk less often: eight times per trial would take longer than a small trial.

    A driver that is killed loses nothing; a machine that loses power loses the last moments, but
    the file stays whole.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA journal_mode=WAL").close()
        self.execute("PRAGMA synchronous=NORMAL").close()


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Open a storage, or make it. Raises whatever the data base's driver raises.

    Args:
        url: as SQLAlchemy and Optuna read it; None: `study.db` in `folder`.
    """
    if url is not None:
        return optuna.storages.get_storage(url)
    storage = RDBStorage(
        f"sqlite:///{folder}/study.db", engine_kwargs={"connect_args": {"factory": _Connection}}
    )
    return optuna.storages.get_storage(storage)


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
