"""Numbers that say how they were found."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Evidence = Literal["measured", "modelled", "assumed"]
"""How a number was found: counted or measured on the model itself, computed by a model of the
hardware, or taken for granted."""

_WEAKEST_LAST: tuple[Evidence, ...] = ("measured", "modelled", "assumed")


@dataclass(frozen=True)
class Figure:
    """A number and how it was found."""

    value: float
    evidence: Evidence


def weakest(evidence: Iterable[Evidence]) -> Evidence:
    """The origin of a number that is computed from others."""
    return max(evidence, key=_WEAKEST_LAST.index)
