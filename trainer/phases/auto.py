"""The search for the fewest bits of each layer at which a model keeps the first metric."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from trainer.compress.allocation import bit_allocations
from trainer.config.drop import check_drop, is_worse, worst_allowed
from trainer.engine.evaluate import Metrics
from trainer.errors import ConfigError
from trainer.metrics import format_metric
from trainer.phases.base import Evaluate

AUTO = "auto"
MAX_BITS = 8
"""The largest number of bits that the search chooses."""


def check_auto(key: str, value: Any, max_drop: Any) -> None:
    """Raise ConfigError for a text other than "auto", and for a wrong `max_drop`."""
    if isinstance(value, str) and value != AUTO:
        raise ConfigError(f"{key}={value!r}: it must be a number or auto")
    check_drop("max_drop", max_drop)


def limit_for(
    model: nn.Module, evaluate: Evaluate, dense: nn.Module | None, max_drop: Any
) -> float:
    """The worst first metric that `max_drop` allows.

    Args:
        dense: None: `model` is the dense model.
    """
    baseline = evaluate(model if dense is None else dense)
    return worst_allowed(baseline.first, max_drop, baseline.direction)


def search_bits(
    sizes: Mapping[str, int],
    least: int,
    measure: Callable[[Mapping[str, int]], Metrics],
    limit: float,
) -> tuple[dict[str, int], str]:
    """Choose the bits of each layer, so that all together are within a limit.

    The sensitivity of each layer is measured first: how much the loss rises when it alone has so
    many bits, from `MAX_BITS` down to `least`, or to where it alone exceeds the limit. It gives a
    sequence of allocations (`trainer.compress.allocation.bit_allocations`), of which the smallest
    one within the limit is found by bisection.

    Args:
        sizes: Number of weights of each layer.
        least: Smallest number of bits.
        measure: The metrics of the model if these layers have so many bits, and the others of
            `sizes` are exact.
        limit: Worst value of the first metric.

    Returns:
        The bits, and a line that reports them.
    """
    exact = measure({})
    rises: dict[str, dict[int, float]] = {}
    for name in sizes:
        rises[name] = {MAX_BITS: 0.0}  # taken as exact; the bisection measures it
        for bits in range(MAX_BITS - 1, least - 1, -1):
            alone = measure({name: bits})
            if is_worse(alone.first, limit, alone.direction):
                break
            rises[name][bits] = alone.loss - exact.loss
    allocations = bit_allocations(sizes, rises)
    low, high = 0, len(allocations)  # within the limit, or the first; beyond it
    best = measure(allocations[0])
    if is_worse(best.first, limit, best.direction):
        high = 1
    while high - low > 1:
        middle = (low + high) // 2
        metrics = measure(allocations[middle])
        if is_worse(metrics.first, limit, metrics.direction):
            high = middle
        else:
            low, best = middle, metrics
    found = allocations[low]
    mean = sum(sizes[name] * found[name] for name in sizes) / max(1, sum(sizes.values()))
    each = ", ".join(f"{name} {bits}" for name, bits in found.items())
    line = (
        f"bits of each layer: {each}; {mean:.2f} on average; before training, {best.name} is "
        f"{format_metric(best.name, best.first)}, the limit {format_metric(best.name, limit)}"
    )
    return found, line
