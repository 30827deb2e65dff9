"""How many weights each layer may lose, by how much each one's loss rises when it loses some."""

import math
from collections.abc import Mapping, Sequence

Curve = Sequence[tuple[float, float]]
"""Fractions of a layer's present weights that are kept, falling from below 1, and how much the loss
rises, in nats, when only this layer is pruned so far."""


_LEAST = 1e-6  # rise, in nats for a factor of e: a flat or falling curve is noise


def allocate(
    kept: Mapping[str, int],
    curves: Mapping[str, Curve],
    floors: Mapping[str, int],
    fraction: float,
) -> dict[str, int]:
    """How many weights each layer keeps, so that all together keep about `fraction` of theirs.

    Every layer is pruned as far as its own curve stays below one common rise of the loss: layers
    that are sensitive keep more. Between the points of a curve, the logarithm of the fraction is
    linear in the rise; beyond its last point a layer is not pruned.

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
    low, high = 0.0, max((rise for curve in curves.values() for _, rise in curve), default=0.0)
    high = max(high, 0.0) + 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        if sum(_at(kept, curves, floors, middle).values()) >= wanted:
            low = middle
        else:
            high = middle
    return _at(kept, curves, floors, low)


def _at(
    kept: Mapping[str, int], curves: Mapping[str, Curve], floors: Mapping[str, int], rise: float
) -> dict[str, int]:
    return {
        name: min(number, max(floors[name], round(number * _fraction(curves[name], rise))))
        for name, number in kept.items()
    }


def _fraction(curve: Curve, rise: float) -> float:
    """The smallest fraction whose rise is at most `rise`; rises are taken as always growing."""
    before, cost = 0.0, 0.0  # logarithm of the fraction, rise
    for fraction, measured in curve:
        now = math.log(fraction)
        measured = max(measured, cost + _LEAST * (before - now))
        if measured > rise:
            share = (rise - cost) / (measured - cost)
            return math.exp(before + share * (now - before))
        before, cost = now, measured
    return math.exp(before)
