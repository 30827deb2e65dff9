"""Reading ahead: the next batches are read while the model computes."""

import queue
import random
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")

_POLL_S = 0.05  # how often a thread that waits for space in the queue checks whether it should end


def spare_cpus() -> int:
    """The number of CPUs of this process that training does not use.

    A worker has as many CPUs as threads of torch (cluster.cpus_per_worker, cluster.threads); on the
    CPU, training needs at least one of them.
    """
    threads = torch.get_num_threads()
    return threads if torch.cuda.is_available() else threads - 1


def generator_states() -> tuple[Any, ...]:
    """The states of the global random generators on the CPU, as a value that can be compared."""
    kind, key, *rest = np.random.get_state()
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        (kind, np.asarray(key).tobytes(), *rest),
    )


def prefetched(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, computed in a separate thread, up to `depth` of them ahead.

    An error in `items` is raised after the items before it. If this iterator is closed, the thread
    ends after the item that it is making.

    Args:
        items: Must not draw from the global random generators, which both threads share.
        depth: Maximum number of items that wait.
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: T | None, error: BaseException | None = None, last: bool = False) -> bool:
        """Whether the item was wanted."""
        while not closed.is_set():
            try:
                waiting.put((item, error, last), timeout=_POLL_S)
                return True
            except queue.Full:
                pass
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(None, last=True)
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = waiting.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
