"""The ring beside gloo's all-reduce and beside raw TCP, in time and in CPU time.

    python benchmarks/allreduce.py [--ranks 2 4] [--quick]          # on this machine
    python benchmarks/allreduce.py --link 1gbit [--ranks 2 3 4]     # on namespaces (root)
    python benchmarks/allreduce.py --rank R --ranks N --host HOST   # on each of N hosts

One process per rank, one thread each. HOST is the address of rank 0, as the others reach it. The
contestants take turns; each time is that of the slowest rank, and the table shows medians of the
repeats. CPU time is the mean over the ranks. Raw TCP: each rank sends what the ring would send to
the next one, 2 (N-1)/N of the payload, while it receives as much, over plain blocking sockets.
"""

import argparse
import datetime
import ipaddress
import os
import platform
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, multiprocessing

from trainer.engine.ring import WIRE_TYPES, NativeAllReduce, RingAllReduce
from trainer.engine.world import World
from trainer.testing.hosts import Hosts

SIZES = {"4 KB": 4 << 10, "1 MB": 1 << 20, "25 MB": 25 << 20, "100 MB": 100 << 20}  # of FP32 values
SECONDS = 8.0  # per row: more repeats where one takes less


class RawTcp:
    """Connections to the next and from the previous rank."""

    def __init__(self, world: World, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = probe.getsockname()[0]
        places = torch.zeros(world.size, 17, dtype=torch.int64)  # port, bytes of the address
        with socket.create_server((own, 0), family=family) as listener:
            packed = ipaddress.ip_address(own).packed
            places[world.rank, 0] = listener.getsockname()[1]
            places[world.rank, 1 : 1 + len(packed)] = torch.tensor(list(packed))
            world.all_reduce(places)
            port, *octets = places[(world.rank + 1) % world.size].tolist()
            address = str(ipaddress.ip_address(bytes(octets[: len(packed)])))
            self._next = socket.create_connection((address, port))
            self._previous, _ = listener.accept()

    def exchange(self, outgoing: Tensor, incoming: Tensor) -> None:
        """Send and receive as many bytes. Raises EOFError if the previous rank has ended."""
        sender = threading.Thread(target=self._next.sendall, args=(outgoing.numpy().data,))
        sender.start()
        rest = incoming.numpy().data
        while rest:
            count = self._previous.recv_into(rest)
            if not count:
                raise EOFError(f"the previous rank has ended, {len(rest)} bytes too early")
            rest = rest[count:]
        sender.join()

    def close(self) -> None:
        self._next.close()
        self._previous.close()


def timed(world: World, work: Callable[[], None]) -> tuple[float, float]:
    """Seconds until the slowest rank is done, and mean CPU seconds of the ranks."""
    world.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    work()
    cpu = time.process_time() - cpu
    seconds = torch.zeros(world.size, 2, dtype=torch.float64)
    seconds[world.rank] = torch.tensor([time.perf_counter() - start, cpu])
    world.all_reduce(seconds)
    return float(seconds[:, 0].max()), float(seconds[:, 1].mean())


def compare(rank: int, size: int, host: str, port: int, quick: bool) -> None:
    torch.set_num_threads(1)
    sizes = dict(list(SIZES.items())[:1]) if quick else SIZES
    world = World.connect(rank, size, host, port, torch.device("cpu"), 60.0)
    raw = RawTcp(world, host)
    for name, payload in sizes.items():
        for wire in ("fp32", "bf16"):
            ring = RingAllReduce(world.transport, WIRE_TYPES[wire])
            native = NativeAllReduce(world.native_all_reduce, size, WIRE_TYPES[wire])
            tensor = torch.randn(payload // 4)
            count = 2 * (size - 1) * len(tensor) * WIRE_TYPES[wire].itemsize // size
            outgoing, incoming = (torch.ones(count, dtype=torch.uint8) for _ in range(2))
            contestants: list[Callable[[], None]] = [
                lambda ring=ring, tensor=tensor: ring.mean_(tensor),
                lambda native=native, tensor=tensor: native.mean_(tensor),
                lambda outgoing=outgoing, incoming=incoming: raw.exchange(outgoing, incoming),
            ]
            first = max(timed(world, work)[0] for work in contestants)
            repeats = 2 if quick else min(200, max(15, int(SECONDS / 3 / first)))
            rounds = [[timed(world, work) for work in contestants] for _ in range(repeats)]
            (ours, our_cpu), (theirs, their_cpu), (tcp, _) = (
                [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
                for times in zip(*rounds, strict=True)
            )
            if rank == 0:
                print(
                    f"| {size} | {name} | {wire} | {ours:.2f} | {theirs:.2f} | {tcp:.2f} | "
                    f"{ours / theirs:.2f} | {tcp / ours:.2f} | {our_cpu / their_cpu:.2f} | "
                    f"{repeats} |",
                    flush=True,
                )
    raw.close()
    world.close()


def compare_beside(index: int, *arguments: Any) -> None:
    compare(index + 1, *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="sizes of the group")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    parser.add_argument("--link", help="a host per rank, on links of this rate, as tc has it")
    parser.add_argument("--rank", type=int, help="run this rank of one group of several hosts")
    parser.add_argument("--host", default="127.0.0.1", help="address of rank 0")
    parser.add_argument("--port", type=int, default=29500, help="of rank 0, with --rank")
    args = parser.parse_args()
    if args.rank is not None:
        compare(args.rank, args.ranks[0], args.host, args.port, args.quick)
        return
    print(
        f"# All-reduce to the mean, {datetime.date.today()}\n\n"
        f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} CPUs, "
        f"load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}; command: python {' '.join(sys.argv)}\n\n"
        "| ranks | FP32 payload | wire | ring ms | gloo ms | raw TCP ms | ring / gloo | "
        "throughput of ring / raw TCP | CPU time ring / gloo | n |\n" + "| --- " * 10 + "|",
        flush=True,
    )
    for size in args.ranks[:1] if args.quick else args.ranks:
        if args.link:
            compare_on_hosts(size, args.link)
            continue
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        arguments = size, "127.0.0.1", port, args.quick
        others = multiprocessing.spawn(compare_beside, arguments, nprocs=size - 1, join=False)
        compare(0, *arguments)
        while not others.join():
            pass


def compare_on_hosts(size: int, rate: str) -> None:
    """A rank on each of `size` hosts."""
    command = [sys.executable, os.path.abspath(__file__), "--ranks", size]
    with Hosts(size, rate) as hosts:
        address = hosts.address(1)
        hosts.run_on_all(lambda host: [*command, "--rank", host - 1, "--host", address])


if __name__ == "__main__":
    main()
