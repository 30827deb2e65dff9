"""Computes parts of a product in several threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def run_parts(function: Callable[[int, int], object], count: int, threads: int) -> None:
    """Call `function(first, last)` for pieces of range(count), one in each thread.

    `function` has to release the interpreter's lock, as compiled kernels do. Each piece is computed
    by one thread, so that the results do not depend on their timing.
    """
    parts = min(threads, count)
    if parts <= 1:
        function(0, count)
        return
    ends = [count * part // parts for part in range(parts + 1)]
    pool = _pool(threads - 1)
    rest = [pool.submit(function, ends[i], ends[i + 1]) for i in range(1, parts)]
    function(ends[0], ends[1])
    for part in rest:
        part.result()


def _pool(workers: int) -> ThreadPoolExecutor:
    """The threads of this process; a forked process does not have those of its parent."""
    key = os.getpid(), workers
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(workers, "trainer-inference")
    return _pools[key]
