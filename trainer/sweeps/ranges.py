"""What one parameter may be: from a text in Hydra's override grammar to Optuna's distribution.

    model.depth: range(1,5)                        1, 2, 3, 4
    model.kernel_size: choice(3,5,7)
    model.width: tag(log, int(interval(8,128)))    both ends included
    optimizer.lr: tag(log, interval(1e-4,1e-1))

What Optuna cannot store (a choice between lists) is known to it by its text.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    QuotedString,
    RangeSweep,
    Sweep,
)
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from trainer.errors import ConfigError, first_line

MOST_STEPS = 1_000_000  # of a range of numbers that are not whole


@dataclass(frozen=True)
class Range:
    """What one parameter may be."""

    distribution: BaseDistribution
    values: Mapping[str, Any]  # of choices that Optuna knows by their text

    def ends(self) -> list[Any]:
        """The values at which a mistake would show: the ends of a range, every choice."""
        match self.distribution:
            case CategoricalDistribution() as chosen:
                return list(chosen.choices)
            case IntDistribution() | FloatDistribution() as numbers:
                return list(dict.fromkeys([numbers.low, numbers.high]))
        raise AssertionError(self.distribution)

    def around(self, marks: Iterable[Any]) -> list[Any]:
        """The ends, the values at `marks` and some between any two of these: every choice.

        So there is one wherever conditions that compare with `marks` hold for any value.
        """
        match self.distribution:
            case IntDistribution() | FloatDistribution() as numbers:
                low, high, step = numbers.low, numbers.high, numbers.step
            case _:
                return self.ends()
        within = (m for m in marks if isinstance(m, int | float) and low < m < high)
        places = sorted({low, *within, high})
        places += [(a + b) / 2 for a, b in pairwise(places)]
        if step is not None:
            counts = (f((p - low) / step) for p in places for f in (math.floor, math.ceil))
            places = [value for n in counts if (value := _nth(low, step, n)) <= high]
        return list(dict.fromkeys([*self.ends(), *places]))

    def count(self) -> int | None:
        """How many values there are; None where they cannot be counted."""
        match self.distribution:
            case CategoricalDistribution() as chosen:
                return len(chosen.choices)
            case IntDistribution() as numbers:
                return (numbers.high - numbers.low) // numbers.step + 1
            case FloatDistribution(step=float() as step) as numbers:
                return round((numbers.high - numbers.low) / step) + 1
        return None

    def all(self) -> list[Any] | None:
        """Every value; None where they cannot be counted."""
        match self.distribution:
            case CategoricalDistribution() as chosen:
                return list(chosen.choices)
            case IntDistribution() as numbers:
                return list(range(numbers.low, numbers.high + 1, numbers.step))
            case FloatDistribution(step=float() as step) as numbers:
                return [_nth(numbers.low, step, i) for i in range(self.count() or 0)]
        return None

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Let Optuna draw."""
        match self.distribution:
            case CategoricalDistribution() as d:
                return trial.suggest_categorical(name, d.choices)
            case IntDistribution() as d:
                return trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
            case FloatDistribution() as d:
                return trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)
        raise AssertionError(self.distribution)


def _nth(low: float, step: float, n: int) -> float:
    """`low + n * step`, as it would be written."""
    if isinstance(step, int):
        return low + n * step
    return float(Decimal(str(low)) + n * Decimal(str(step)))


def parse_range(key: str, text: Any) -> Range:
    """A range from its text. Raises ConfigError, which names sweep.params.KEY and the text."""
    said = f"sweep.params.{key}={text}"
    if not isinstance(text, str):
        raise ConfigError(f"{said}: it must be a text such as choice(3,5,7) or range(1,5)")
    try:
        parsed = OverridesParser.create().parse_override(f"x={text}").value()
    except HydraException as error:
        raise ConfigError(f"{said}: {first_line(error)}") from error
    if not isinstance(parsed, Sweep):
        raise ConfigError(
            f"{said}: it must be a choice(...), range(...) or interval(...), "
            "perhaps inside int(...) or tag(log, ...)"
        )
    if unknown := parsed.tags - {"log"}:
        raise ConfigError(f"{said}: the tag {', '.join(sorted(unknown))} means nothing; log does")
    if getattr(parsed, "shuffle", False):
        raise ConfigError(f"{said}: the sampler decides the order; leave shuffle() out")
    try:
        return _range(parsed, "log" in parsed.tags)
    except (ValueError, HydraException) as error:
        raise ConfigError(f"{said}: {first_line(error)}") from error


def _range(parsed: Sweep, log: bool) -> Range:
    match parsed:
        case ChoiceSweep():
            if log:
                raise ValueError("log is for numbers between two ends, not for a choice")
            return _choice([_plain(item) for item in parsed.list])
        case IntervalSweep(start=low, end=high):
            assert low is not None
            assert high is not None
            if not low < high:
                raise ValueError(f"there is nothing between {low} and {high}")
            if isinstance(low, int) and isinstance(high, int):
                return Range(IntDistribution(low, high, log=log), {})
            return Range(FloatDistribution(float(low), float(high), log=log), {})
        case RangeSweep():
            assert parsed.start is not None
            assert parsed.stop is not None
            numbers = parsed.range()
            whole = isinstance(numbers, range)
            span = abs(parsed.stop - parsed.start)
            if not whole and span > MOST_STEPS * abs(parsed.step) > 0:
                raise ValueError(f"it has more than {MOST_STEPS:,} values; use interval(...)")
            values = numbers if isinstance(numbers, range) else list(numbers)
            if not values:
                raise ValueError("it is empty: the end is not part of a range")
            low, high = sorted((values[0], values[-1]))
            step = abs(parsed.step)
            if whole:
                return Range(IntDistribution(int(low), int(high), step=int(step), log=log), {})
            if log:
                raise ValueError("log and a step exclude each other; use interval(...)")
            return Range(FloatDistribution(low, high, step=float(step)), {})
    raise ValueError("it must be a choice, a range or an interval")


def _choice(items: list[Any]) -> Range:
    """Optuna stores plain values only; lists and mappings are known to it by their text."""
    values = {str(item): item for item in items if isinstance(item, list | dict)}
    labels = [str(item) if isinstance(item, list | dict) else item for item in items]
    if len({repr(label) for label in labels}) < len(labels):
        raise ValueError("a value is there twice")
    return Range(CategoricalDistribution(labels), values)


def _plain(item: Any) -> Any:
    match item:
        case QuotedString():
            return item.text
        case list():
            return [_plain(part) for part in item]
        case dict():
            return {_plain(key): _plain(part) for key, part in item.items()}
    return item
