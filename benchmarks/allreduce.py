"""The ring beside gloo's all-reduce on this machine.

    python benchmarks/allreduce.py [--quick]

One process per rank on the loopback, one thread each. The two algorithms take turns; each time is
that of the slowest rank, and the table shows medians of the repeats.
"""

import argparse
import datetime
import platform
import socket
import statistics
import sys

import torch
from torch import multiprocessing

from trainer.engine.ring import WIRE_TYPES, NativeAllReduce, RingAllReduce
from trainer.engine.world import World
from trainer.lecture.ring import timed

SIZES = {"4 KB": 4 << 10, "1 MB": 1 << 20, "25 MB": 25 << 20, "100 MB": 100 << 20}  # of FP32 values
SEGMENT_BYTES = 1 << 20
SECONDS = 8.0  # per row: more repeats where one takes less


def worker(rank: int, size: int, port: int, quick: bool) -> None:
    torch.set_num_threads(1)
    sizes = dict(list(SIZES.items())[:1]) if quick else SIZES
    world = World.connect(rank, size, "127.0.0.1", port, torch.device("cpu"), 60.0)
    for name, payload in sizes.items():
        for wire in ("fp32", "bf16"):
            ring = RingAllReduce(world.transport, WIRE_TYPES[wire], SEGMENT_BYTES)
            native = NativeAllReduce(world.native_all_reduce, size, WIRE_TYPES[wire])
            tensor = torch.randn(payload // 4)
            first = max(timed(world, algorithm, tensor) for algorithm in (ring, native))
            repeats = 2 if quick else min(200, max(15, int(SECONDS / 2 / first)))
            times: list[tuple[float, float]] = [
                (timed(world, ring, tensor), timed(world, native, tensor)) for _ in range(repeats)
            ]
            ours, theirs = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
            if rank == 0:
                print(
                    f"| {size} | {name} | {wire} | {ours:.2f} | {theirs:.2f} | "
                    f"{ours / theirs:.2f} | {repeats} |",
                    flush=True,
                )
    world.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    print(
        f"# All-reduce to the mean over loopback, {datetime.date.today()}\n\n"
        f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} CPUs, "
        f"Python {platform.python_version()}, torch {torch.__version__}; "
        f"command: python {' '.join(sys.argv)}\n\n"
        "| ranks | FP32 payload | wire | ring ms | gloo ms | ring / gloo | n |\n"
        "| --- | --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    for size in (2,) if args.quick else (2, 4):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        multiprocessing.spawn(worker, (size, port, args.quick), nprocs=size)


if __name__ == "__main__":
    main()
