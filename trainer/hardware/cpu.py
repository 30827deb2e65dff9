"""Latency and energy of a model on this machine's CPU, and limits of the CPU."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.hardware.figures import Figure

WATTS_PER_THREAD = 10.0
"""Power of a busy core with its share of the caches and memory: an assumption, used where the
machine shows no energy counter."""

_COUNTER = Path("/sys/class/powercap/intel-rapl:0")
_WARM_UP = 2
_MIN_REPEATS = 3


class CpuCost(NamedTuple):
    """One execution of a function."""

    seconds: Figure
    joules: Figure
    repeats: int


class CpuLimits(NamedTuple):
    """Peak performance of a CPU, measured with PyTorch."""

    operations: float
    """fp32 multiplications and additions per second, in a product of large matrices."""
    bandwidth: float
    """Bytes per second that a product of a large matrix and a vector reads."""


def measure(
    call: Callable[[], object],
    threads: int = 1,
    watts: float | None = None,
    seconds: float = 0.5,
    counter: Path = _COUNTER,
) -> CpuCost:
    """Median time of a function, and its energy.

    The energy is measured where the machine has a counter (Linux powercap, the whole package) that
    may be read; otherwise it is the time at an assumed power.

    Args:
        call: The function.
        threads: Threads of PyTorch.
        watts: Power of the busy CPU; None: `WATTS_PER_THREAD` for each thread.
        seconds: How long to repeat it; it runs three times at least.
        counter: Folder of the energy counter.
    """
    power = WATTS_PER_THREAD * threads if watts is None else watts
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(_WARM_UP):
            call()
        times: list[float] = []
        first, begun = _microjoules(counter), time.perf_counter()
        while len(times) < _MIN_REPEATS or time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        last = _microjoules(counter)
    finally:
        torch.set_num_threads(before)
    typical = statistics.median(times)
    joules = Figure(typical * power, "assumed")
    if first is not None and last is not None and last > first:  # it starts again at 0 sometimes
        joules = Figure((last - first) / 1e6 / len(times), "measured")
    return CpuCost(Figure(typical, "measured"), joules, len(times))


def measure_model(
    model: nn.Module,
    samples: Tensor,
    threads: int = 1,
    watts: float | None = None,
    seconds: float = 0.5,
) -> CpuCost:
    """Time and energy of a batch; arguments as `measure`. The model's mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return measure(lambda: model(samples), threads, watts, seconds)
    finally:
        model.train(training)


def measure_limits(threads: int = 1) -> CpuLimits:
    """Measure the peak performance of the CPU; takes about 0.1 s."""
    size, rows = 512, 4096
    square, tall = torch.rand(size, size), torch.rand(rows, rows)  # 64 MiB: more than caches hold
    vector = torch.rand(rows)
    product = measure(lambda: square @ square, threads, seconds=0.05)
    reading = measure(lambda: tall @ vector, threads, seconds=0.1)
    return CpuLimits(2 * size**3 / product.seconds.value, 4 * rows**2 / reading.seconds.value)


def _microjoules(counter: Path) -> int | None:
    """The reading of the energy counter; None if there is none, or only root may read it."""
    with suppress(OSError, ValueError):
        return int((counter / "energy_uj").read_text())
    return None
