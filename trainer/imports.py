"""Imports of large packages without the garbage collector, which takes a sixth of their time."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's collector of reference cycles in a block that imports torch.

    An import makes hundreds of thousands of objects that all stay, and the collector searches them
    again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
