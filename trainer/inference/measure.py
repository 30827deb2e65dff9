"""Measures the times of several functions in turn."""

import statistics
import time
from collections.abc import Callable, Mapping

WARM_UP = 3  # rounds that are not counted


def alternate(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Call the functions in turn, and return the seconds of each call.

    Args:
        seconds: Duration of the measurement.
        rounds: The smallest number of rounds.
        clock: The clock to use; `time.thread_time` for functions that compute in the calling
            thread, on a machine that does other work as well.
    """
    for _ in range(WARM_UP):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    done = 0
    while done < rounds or time.perf_counter() < end:
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
        done += 1
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each function."""
    return {name: statistics.median(taken) for name, taken in times.items()}
