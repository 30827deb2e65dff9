"""Figures that Han et al. published about EIE: ISCA 2016, arXiv:1602.01528, tables III to V.

The values serve to check the simulator against; it does not compute with them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedLayer:
    """A benchmark of tables III and IV: a fully connected layer at batch size 1."""

    name: str
    inputs: int
    outputs: int
    weight_density: float
    """Fraction of weights that are not zero, rounded to a percent."""
    activation_density: float
    """Fraction of activations that are not zero, on average, rounded to a tenth of a percent."""
    theoretical: float
    """Microseconds of EIE with perfect load balance."""
    actual: float
    """Microseconds of EIE in the authors' simulation."""
    cpu_dense: float
    """Microseconds of a Core i7-5930K on the dense matrix."""


# fmt: off
LAYERS = (
    PublishedLayer("Alex-6", 9216, 4096, 0.09, 0.351, 28.1, 30.3, 7516.2),
    PublishedLayer("Alex-7", 4096, 4096, 0.09, 0.353, 11.7, 12.2, 6187.1),
    PublishedLayer("Alex-8", 4096, 1000, 0.25, 0.375, 8.9, 9.9, 1134.9),
    PublishedLayer("VGG-6", 25088, 4096, 0.04, 0.183, 28.1, 34.4, 35022.8),
    PublishedLayer("VGG-7", 4096, 4096, 0.04, 0.375, 7.9, 8.7, 5372.8),
    PublishedLayer("VGG-8", 4096, 1000, 0.23, 0.411, 7.3, 8.4, 774.2),
    PublishedLayer("NT-We", 4096, 600, 0.10, 1.0, 5.2, 8.0, 605.0),
    PublishedLayer("NT-Wd", 600, 8791, 0.11, 1.0, 13.0, 13.9, 1361.4),
    PublishedLayer("NT-LSTM", 1201, 2400, 0.10, 1.0, 6.5, 7.5, 470.5),
)
# fmt: on

CPU_SPEEDUP = 189
"""Geometric mean of the speed-ups over the CPU on dense matrices (figure 6)."""

CPU_ENERGY_RATIO = 24_207
"""Geometric mean of the energy efficiencies relative to that CPU (figure 7)."""

CPU_WATTS = 73
"""Power of the CPU (table V)."""

ELEMENT_MILLIWATTS = 9.157
"""Power of one processing element (table II)."""

ELEMENT_SQUARE_MICROMETRES = 638_024
"""Area of one processing element (table II)."""


@dataclass(frozen=True)
class PublishedAccelerator:
    """A column of table V; frames are products with the matrix of Alex-7."""

    elements: int
    clock: float
    """Hz."""
    watts: float
    square_millimetres: float
    frames_per_second: float
    frames_per_joule: float


EIE_64 = PublishedAccelerator(64, 800e6, 0.59, 40.8, 81_967, 138_927)
"""45 nm."""

EIE_256 = PublishedAccelerator(256, 1200e6, 2.36, 63.8, 426_230, 180_606)
"""28 nm, projected by the authors."""
