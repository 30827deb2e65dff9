"""Figures that Jouppi et al. published about the TPU: ISCA 2017, arXiv:1704.04760.

The values serve to check the simulator against; it does not compute with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class PublishedApplication:
    """Performance counters of an application: rows of table 3, in percent of all cycles."""

    active: float
    """Row 1."""
    useful: float
    """Row 2: active cycles, times the fraction of the array that holds weights."""
    unused: float
    """Row 3."""
    weight_stall: float
    """Row 4."""
    weight_shift: float
    """Row 5."""
    non_matrix: float
    """Row 6."""
    tops: float
    """Row 9: 10^12 operations per second, from another measurement than the other rows."""


# fmt: off
APPLICATIONS: Mapping[str, PublishedApplication] = MappingProxyType({
    "MLP0": PublishedApplication(12.7, 12.5, 0.3, 53.9, 15.9, 17.5, 12.3),
    "MLP1": PublishedApplication(10.6, 9.4, 1.2, 44.2, 13.4, 31.9, 9.7),
    "LSTM0": PublishedApplication(8.2, 8.2, 0.0, 58.1, 15.8, 17.9, 3.7),
    "LSTM1": PublishedApplication(10.5, 6.3, 4.2, 62.1, 17.1, 10.3, 2.8),
    "CNN0": PublishedApplication(78.2, 78.2, 0.0, 0.0, 0.0, 21.8, 86.0),
    "CNN1": PublishedApplication(46.2, 22.5, 23.7, 28.1, 7.0, 18.7, 14.1),
})
# fmt: on

MATRIX_600_MICROSECONDS: Mapping[int, float] = MappingProxyType({256: 18.0, 512: 32.0})
"""Time to load the weights of a 600 x 600 matrix, by the size of the array (section 7)."""

TPU_PRIME_SPEEDUP = 2.6
"""Geometric mean of the speed-ups of TPU', host time excluded (section 7)."""
