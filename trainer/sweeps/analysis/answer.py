"""What goes into an analysis and comes out of it, and the statistics of few repeats."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.report.tables import Table

ROUNDING = 1e-9  # a mean this close to zero is what rounding left of zero


@dataclass(frozen=True)
class Row:
    """A trial that was completed."""

    settings: Mapping[str, Any]  # by dotted key
    measured: Mapping[str, float]  # trainer.sweeps.measures


@dataclass
class Answer:
    """Tables, figures (plotly) by title, and what they say."""

    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """Mean of a few repeats, and how far they lie apart."""

    n: int
    mean: float
    deviation: float  # standard deviation of the sample; NaN for one repeat

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(self.n)

    def clear(self, level: float) -> bool:
        """Whether the mean differs from zero by Student's t test, two-sided, at `level`."""
        if self.n < 2 or abs(self.mean) < ROUNDING:
            return False
        t = self.mean / self.error if self.error else math.inf
        return p_value(t, self.n - 1) < level

    def format(self, spec: str, scale: float = 1.0) -> str:
        """Mean and standard deviation, as `spec` formats numbers."""
        mean = format(scale * self.mean, spec)
        if self.n < 2:
            return mean
        return f"{mean} ± {format(scale * self.deviation, spec.lstrip('+'))}"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(len(values), statistics.fmean(values), deviation)


def p_value(t: float, freedom: int) -> float:
    """How often Student's t is at least as far from zero as `t` where nothing but chance decides.

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
