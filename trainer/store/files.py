"""Files that appear whole or not at all: written aside, then renamed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

ASIDE = ".part"  # what the name of a file ends with until it is whole


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = False) -> None:
    """Put what `write` writes in the place of `path`.

    Args:
        durable: return only when file and name are on the disk, and outlive a loss of power.

    Raises:
        OSError: it cannot be written; what was at `path` before is still there, and nothing else.
    """
    aside = path.with_name(path.name + ASIDE)
    try:
        with aside.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
