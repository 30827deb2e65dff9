"""Compiled functions whose disk cache can be trusted."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
).hexdigest()


def jit(function: F) -> F:
    """numba.njit, kept on disk until any file of trainer.compress changes.

    Other threads go on while it runs: a worker with a layer that takes minutes still answers.
    Numba itself looks only at the file of the function: after a change to a table or a helper
    elsewhere it would go on with the old one, and decode other levels than were written. Where no
    directory can be written to, or numba keeps its cache in another way, each process compiles
    anew.
    """
    compiler: Any = functools.partial(njit, nogil=True)
    try:
        compiled = compiler(cache=True)(function)
        index = compiled._cache._cache_file
        index._source_stamp = (index._source_stamp, _SOURCES)
    except (RuntimeError, AttributeError):
        return compiler()(function)  # type: ignore[no-any-return]
    return compiled  # type: ignore[no-any-return]
