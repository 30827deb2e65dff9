"""Several ranks in one process: a thread each, connected over the loopback as workers are."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.engine.world import World

CPU = torch.device("cpu")


def run_threads(size: int, body: Callable[[int], Any]) -> list[Any]:
    """`body(rank)` on `size` threads at once: their results, or the first error by time."""
    results: list[Any] = [None] * size
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
    return results


def run_ranks(size: int, body: Callable[[World], Any], timeout_s: float = 20.0) -> list[Any]:
    """`body(world)` on each rank of a new group. A rank that fails closes its world."""
    server = World.listen("127.0.0.1")

    def join(rank: int) -> Any:
        world = World.connect(
            rank,
            size,
            "127.0.0.1",
            server.port,
            CPU,
            timeout_s,
            server if rank == 0 else None,
            server.token,
        )
        try:
            return body(world)
        finally:
            world.close()

    return run_threads(size, join)


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    return run_ranks


@pytest.fixture(scope="session")
def threads() -> Callable[..., list[Any]]:
    return run_threads
