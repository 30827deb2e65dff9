"""How much each layer is compressed, by how much the loss rises when it alone is."""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

Curve = Sequence[tuple[float, float]]
"""Fractions of a layer's present weights that are kept, falling from below 1, and how much the loss
rises, in nats, when only this layer is pruned so far."""


_MIN_RISE = 1e-6  # rise, in nats for a factor of e: a flat or falling curve is noise


def allocate(
    kept: Mapping[Key, int],
    curves: Mapping[Key, Curve],
    floors: Mapping[Key, int],
    fraction: float,
) -> dict[Key, int]:
    """How many weights each layer keeps, so that all together keep about `fraction` of theirs.

    Every layer is pruned as far as its own curve stays below one common rise of the loss: layers
    that are sensitive keep more. Where a curve is flat or falls it is taken to rise a little.
    Between the points of a curve, the logarithm of the fraction is linear in the rise; beyond its
    last point a layer is not pruned.

    Args:
        kept: weights that each layer has now.
        curves: of each layer.
        floors: what each layer keeps at least.
        fraction: in (0, 1).

    Returns:
        Numbers of which none is above `kept`, nor below its floor; their sum is the smallest that
        is at least `fraction` of all, or as small as curves and floors let it be.
    """
    wanted = fraction * sum(kept.values())
    lifted = {name: _lifted(curve) for name, curve in curves.items()}
    low, high = 0.0, max((rise for curve in lifted.values() for _, rise in curve), default=0.0)
    high += 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        if sum(_at(kept, lifted, floors, middle).values()) >= wanted:
            low = middle
        else:
            high = middle
    return _at(kept, lifted, floors, low)


def bit_allocations(
    sizes: Mapping[str, int], rises: Mapping[str, Mapping[int, float]]
) -> list[dict[str, int]]:
    """Bits of each layer's weights, from the most accurate allocation to the smallest.

    From one allocation to the next, one layer loses bits: the one whose loss rises least for each
    bit that is saved. These are the allocations with the smallest sum of rises for their size
    (Shoham & Gersho, 1988, doi:10.1109/29.90373), as far as rises add up.

    Args:
        sizes: Number of weights of each layer.
        rises: For each layer, how much the loss rises, in nats, when it alone has so many bits. The
            first allocation has the most bits of each.
    """
    steps: list[tuple[float, str, int]] = []  # loss for a bit, layer, its new bits
    for name, measured in rises.items():
        bits = sorted(measured, reverse=True)
        growing = itertools.accumulate((max(0.0, measured[b]) for b in bits), max)
        lifted = dict(zip(bits, growing, strict=True))
        now = bits[0]
        while now > bits[-1]:
            costs = {b: (lifted[b] - lifted[now]) / (now - b) for b in bits if b < now}
            cost, now = min((cost, b) for b, cost in costs.items())
            steps.append((cost / sizes[name], name, now))
    allocation = {name: max(measured) for name, measured in rises.items()}
    found = [allocation]
    for _, name, bits_now in sorted(steps, key=lambda step: step[0]):
        allocation = {**allocation, name: bits_now}
        found.append(allocation)
    return found


def _at(
    kept: Mapping[Key, int], curves: Mapping[Key, Curve], floors: Mapping[Key, int], rise: float
) -> dict[Key, int]:
    return {
        name: min(number, max(floors[name], round(number * _fraction(curves[name], rise))))
        for name, number in kept.items()
    }


def _lifted(curve: Curve) -> Curve:
    """The curve with rises that always grow."""
    lifted: list[tuple[float, float]] = []
    before, cost = 0.0, 0.0  # logarithm of the fraction, rise
    for fraction, measured in curve:
        now = math.log(fraction)
        cost = max(measured, cost + _MIN_RISE * (before - now))
        lifted.append((fraction, cost))
        before = now
    return lifted


def _fraction(lifted: Curve, rise: float) -> float:
    """The smallest fraction whose rise is at most `rise`."""
    before, cost = 0.0, 0.0  # logarithm of the fraction, rise
    for fraction, measured in lifted:
        now = math.log(fraction)
        if measured > rise:
            share = (rise - cost) / (measured - cost)
            return math.exp(before + share * (now - before))
        before, cost = now, measured
    return math.exp(before)
