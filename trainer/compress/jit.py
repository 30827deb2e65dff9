"""Compiled functions whose disk cache can be trusted."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


@functools.cache
def _sources(folder: Path) -> str:
    """A hash of the Python files in a folder and in those below it."""
    files = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _folder(function: Callable[..., Any]) -> Path:
    """Where the files are that a function may use: trainer.compress, or its own folder."""
    here, own = Path(__file__).parent, Path(function.__code__.co_filename).parent
    return here if own.is_relative_to(here) else own


def jit(function: F) -> F:
    """numba.njit with a cache on disk that is valid until a file in `_folder` changes.

    The compiled function releases the GIL, so that a worker that codes a layer for minutes still
    sends its heartbeat. Numba's own cache depends only on the file of the function: after a change
    to a table or helper in another file, it would use outdated code and decode wrong levels. If no
    directory is writable, or numba's cache is organized differently, each process compiles again.
    """
    compiler: Any = functools.partial(njit, nogil=True)
    try:
        compiled = compiler(cache=True)(function)
        index = compiled._cache._cache_file
        index._source_stamp = (index._source_stamp, _sources(_folder(function)))
    except (RuntimeError, AttributeError):
        return compiler()(function)  # type: ignore[no-any-return]
    return compiled  # type: ignore[no-any-return]
