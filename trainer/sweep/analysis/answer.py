"""What goes into an analysis and comes out of it, and the statistics of few repeats."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.report.sheets import Sheet


@dataclass(frozen=True)
class Row:
    """A trial that was completed."""

    settings: Mapping[str, Any]  # by dotted key
    measured: Mapping[str, float]  # trainer.sweep.measures


@dataclass
class Answer:
    """Tables, figures (plotly) by title, and what they say."""

    sheets: list[Sheet] = field(default_factory=list)
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

    def clear(self) -> bool:
        """Whether the mean is further from zero than twice its standard error."""
        return self.n > 1 and abs(self.mean) > 2 * self.error

    def told(self, spec: str, scale: float = 1.0) -> str:
        """Mean and standard deviation, as `spec` formats numbers."""
        mean = format(scale * self.mean, spec)
        if self.n < 2:
            return mean
        return f"{mean} ± {format(scale * self.deviation, spec.lstrip('+'))}"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(len(values), statistics.fmean(values), deviation)
