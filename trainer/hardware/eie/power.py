"""Power, energy and area of EIE, from the figures that its authors published for 45 nm.

Han et al., EIE, ISCA 2016, arXiv:1602.01528, table II (one processing element after place and
route) and section IV (the tree that finds activations other than zero). The power is that of a
busy accelerator; energy is power times time, as in the paper.
"""

from collections.abc import Mapping
from types import MappingProxyType

MODULE_MILLIWATTS: Mapping[str, float] = MappingProxyType(
    {
        "activation queue": 0.112,
        "pointer read": 1.807,
        "sparse matrix read": 4.955,
        "arithmetic": 1.162,
        "activation read and write": 1.122,
    }
)
"""Power of one processing element by module, at 800 MHz."""

MODULE_SQUARE_MICROMETRES: Mapping[str, float] = MappingProxyType(
    {
        "activation queue": 758,
        "pointer read": 121_849,
        "sparse matrix read": 469_412,
        "arithmetic": 3_110,
        "activation read and write": 18_934,
        "filler cells": 23_961,
    }
)
"""Area of one processing element by module."""

DETECTION_MILLIWATTS = 0.023
"""Power of one node of the tree that detects activations other than zero."""

DETECTION_SQUARE_MICROMETRES = 189
"""Area of one such node."""


def detection_nodes(elements: int) -> int:
    """Nodes of a quadtree over the elements: 16 + 4 + 1 = 21 for 64 elements."""
    nodes = 0
    while elements > 1:
        elements = -(-elements // 4)
        nodes += elements
    return nodes


def watts(elements: int) -> float:
    """Power of a busy accelerator at 45 nm and 800 MHz."""
    modules = sum(MODULE_MILLIWATTS.values())
    return (elements * modules + detection_nodes(elements) * DETECTION_MILLIWATTS) / 1e3


def square_millimetres(elements: int) -> float:
    """Area of an accelerator at 45 nm."""
    modules = sum(MODULE_SQUARE_MICROMETRES.values())
    return (elements * modules + detection_nodes(elements) * DETECTION_SQUARE_MICROMETRES) / 1e6
