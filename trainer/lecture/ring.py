"""What a ring all-reduce costs on this machine: bytes and seconds, beside its bound."""

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing

from trainer.engine.ring import AllReduce, NativeAllReduce, RingAllReduce
from trainer.engine.world import World

RANKS = (2, 3, 4)
BYTES = (1 << 20, 25 << 20)  # of FP32 values
REPEATS = 15


def measure(short: bool) -> list[dict[str, float]]:
    """Measure processes of this machine with one thread each; the algorithms take turns.

    Returns:
        For each number of ranks and payload: bytes that a rank sends and its bound,
        2 (N-1)/N of the payload (Patarasuk & Yuan 2009); median milliseconds of the slowest rank by
        the ring, by gloo, and by sending as many bytes as the bound to the next rank (`link`).
    """
    rows = []
    for size in RANKS[:1] if short else RANKS:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        repeats, sizes = (2, BYTES[:1]) if short else (REPEATS, BYTES)
        multiprocessing.spawn(_rank, (size, port, sizes, repeats, queue), nprocs=size)
        rows += [queue.get() for _ in sizes]
    return rows


def _rank(
    rank: int, size: int, port: int, sizes: tuple[int, ...], repeats: int, queue: Any
) -> None:
    torch.set_num_threads(1)
    world = World.connect(rank, size, "127.0.0.1", port, torch.device("cpu"), 60.0)
    ring = RingAllReduce(world.transport, torch.float32)
    native = NativeAllReduce(world.native_all_reduce, size, torch.float32)
    for payload in sizes:
        tensor = torch.randn(payload // 4)
        bound = 2 * (size - 1) / size * payload
        for algorithm in (ring, native):
            timed(world, algorithm, tensor)
        before = ring.sent_bytes
        times = [
            [timed(world, ring, tensor), timed(world, native, tensor), _link(world, tensor)]
            for _ in range(repeats)
        ]
        milliseconds = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
        milliseconds[2] *= bound / payload
        sent = (ring.sent_bytes - before) / repeats
        if rank == 0:
            names = ("ring", "gloo", "link")
            queue.put(
                {"ranks": size, "payload": payload, "sent": sent, "bound": bound, "n": repeats}
                | dict(zip(names, milliseconds, strict=True))
            )
    world.close()


def timed(world: World, algorithm: AllReduce, tensor: torch.Tensor) -> float:
    """Seconds from a common start until the slowest rank has the mean."""
    work = tensor.clone()
    return _slowest(world, lambda: algorithm.mean_(work))


def _link(world: World, tensor: torch.Tensor) -> float:
    """Seconds to send a tensor to the next rank while one arrives from the rank before."""
    incoming = torch.empty_like(tensor)
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    transport = world.transport
    return _slowest(world, lambda: transport.exchange(tensor, right, incoming, left).wait())


def _slowest(world: World, work: Callable[[], None]) -> float:
    """Seconds from a common start until the slowest rank is done."""
    world.barrier()
    start = time.perf_counter()
    work()
    seconds = torch.zeros(world.size, dtype=torch.float64)
    seconds[world.rank] = time.perf_counter() - start
    world.all_reduce(seconds)
    return float(seconds.max())
