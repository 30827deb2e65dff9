"""Several ranks in one process: a thread each, connected as workers of one host are."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from trainer.engine.world import World

T = TypeVar("T")


def run_threads(size: int, body: Callable[[int], T]) -> list[T]:
    """Call `body(rank)` in `size` threads at once.

    Returns:
        The results by rank.

    Raises:
        BaseException: The error that was raised first.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


def run_ranks(size: int, body: Callable[[World], T], timeout_s: float = 20.0) -> list[T]:
    """Call `body(world)` on each rank of a new group on the CPU.

    A rank that fails closes its world, so that the others do not wait for it until the limit.

    Args:
        size: Number of ranks.
        body: Called in one thread per rank.
        timeout_s: Limit of each wait of a rank for the others, in seconds.

    Returns:
        The results by rank.

    Raises:
        BaseException: The error that was raised first.
    """
    server = World.listen("127.0.0.1")

    def join(rank: int) -> T:
        world = World.connect(
            rank,
            size,
            "127.0.0.1",
            server.port,
            torch.device("cpu"),
            timeout_s,
            server if rank == 0 else None,
            server.token,
        )
        try:
            return body(world)
        finally:
            world.close()

    return run_threads(size, join)
