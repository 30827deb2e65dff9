"""Compiled functions whose disk cache can be trusted."""

import fcntl
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import IndexDataCacheFile

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


class _CacheFile(IndexDataCacheFile):
    """Numba's index of the compiled variants of a function, and their files.

    Numba's own lets processes that compile at the same time exchange each other's variants, and
    finds outdated ones between the moments at which a new index and a new variant are written.
    """

    def load(self, key: Any) -> Any:
        """The compiled variant for a signature; None: there is none."""
        with self._locked():
            return super().load(key)

    def save(self, key: Any, data: Any) -> None:
        """Keep the compiled variant for a signature."""
        with self._locked():
            if not self._load_index():  # variants that are there belong to other sources
                prefix = self._index_name.removesuffix("nbi")
                for path in Path(self._cache_path).iterdir():
                    if path.name.startswith(prefix) and path.suffix == ".nbc":
                        path.unlink(missing_ok=True)
            super().save(key, data)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Context in which no other process reads or writes the folder of the cache."""
        try:
            file = os.open(os.path.join(self._cache_path, "numba.lock"), os.O_RDWR | os.O_CREAT)
        except OSError:  # there is no folder yet, or it cannot be written to
            yield
            return
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            with suppress(OSError):  # a process that was forked meanwhile would keep it
                fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)


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
        cache = compiled._cache
        stamp = (cache._cache_file._source_stamp, _sources(_folder(function)))
        cache._cache_file = _CacheFile(cache._cache_path, cache._impl.filename_base, stamp)
    except (RuntimeError, AttributeError, TypeError):
        return compiler()(function)  # type: ignore[no-any-return]
    return compiled  # type: ignore[no-any-return]
