"""Atomic writing: a file is written under another name, and renamed when it is complete."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # suffix of a file that is not complete yet


def atomic_write(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = False) -> None:
    """Replace the content of a file atomically.

    Args:
        path: The file; its folder exists.
        write: Writes the content to the open file that it is given.
        durable: Whether to return only when the file survives a loss of power.

    Raises:
        OSError: It cannot be written. The file at `path` is unchanged.
    """
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
