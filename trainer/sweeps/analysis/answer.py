"""Input and output of an analysis, and statistics of a few repeated measurements."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.report.table import Table

ROUNDING = 1e-9  # a mean this close to zero is a rounding error


@dataclass(frozen=True)
class Row:
    """A completed trial."""

    settings: Mapping[str, Any]  # by dotted key
    measured: Mapping[str, float]  # trainer.sweeps.measures


@dataclass
class Answer:
    """Tables, charts and conclusions. Each chart is a function that draws it and returns SVG."""

    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Callable[[], str]] = field(default_factory=dict)  # by caption
    sentences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a few repeated measurements."""

    n: int
    mean: float
    deviation: float  # standard deviation of the sample; NaN for one value

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(self.n)

    def is_significant(self, level: float) -> bool:
        """Whether the mean differs from zero by Student's t test, two-sided, at `level`."""
        if self.n < 2 or abs(self.mean) < ROUNDING:
            return False
        t = self.mean / self.error if self.error else math.inf
        return p_value(t, self.n - 1) < level

    def format(self, spec: str, scale: float = 1.0) -> str:
        """Mean and standard deviation as text.

        Args:
            spec: of the numbers, as in the built-in format.
            scale: factor for both, such as 100 for percent.
        """
        mean = format(scale * self.mean, spec)
        if self.n < 2:
            return mean
        return f"{mean} ± {format(scale * self.deviation, spec.lstrip('+'))}"


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(len(values), statistics.fmean(values), deviation)


def p_value(t: float, freedom: int) -> float:
    """Two-sided p-value: the probability that Student's t is at least as far from zero as `t`.

    Abramowitz & Stegun, Handbook of Mathematical Functions, 1964, 26.7.3 and 26.7.4.

    Args:
        freedom: degrees of freedom, at least 1.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    odd = freedom % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    within = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + within) if odd else within)
