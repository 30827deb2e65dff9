"""The range of one parameter: from a text in Hydra's override grammar to Optuna's distribution.

    model.depth: range(1,5)                        1, 2, 3, 4
    model.kernel_size: choice(3,5,7)
    model.width: tag(log, int(interval(8,128)))    both ends included
    optimizer.lr: tag(log, interval(1e-4,1e-1))

A range does not include its end, an interval includes both. A choice that Optuna cannot store
(a list, or values that Python considers equal, such as 1, 1.0 and true) is stored as its text.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
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
from trainer.sweeps.overrides import hydra_text

MAX_STEPS = 1_000_000  # of a range of floats


@dataclass(frozen=True)
class Range:
    """The range of one parameter."""

    distribution: BaseDistribution
    values: Mapping[str, Any]  # of a choice, by the texts that Optuna stores

    def value(self, stored: Any) -> Any:
        """The value of a setting for what Optuna stores.

        Optuna computes `low + n * step` in binary floats, which gives 0.30000000000000004 for
        0.1 + 2 * 0.1. The value is the one that a person would write: 0.3.
        """
        match self.distribution:
            case FloatDistribution(low=low, step=float() as step):
                return _nth(low, step, round((stored - low) / step))
            case CategoricalDistribution() if isinstance(stored, str):
                return self.values.get(stored, stored)
        return stored

    def ends(self) -> list[Any]:
        """The values that are validated: the ends of a range, or every choice."""
        match self.distribution:
            case CategoricalDistribution() as chosen:
                return list(chosen.choices)
            case IntDistribution() | FloatDistribution() as numbers:
                return list(dict.fromkeys([numbers.low, numbers.high]))
        raise AssertionError(self.distribution)

    def around(self, marks: Iterable[Any]) -> list[Any]:
        """Values that cover all cases of conditions that compare with `marks`.

        These are the ends, the marks, and values between any two of them; or every choice.
        """
        match self.distribution:
            case IntDistribution() | FloatDistribution() as numbers:
                low, high, step = numbers.low, numbers.high, numbers.step
            case _:
                return self.ends()
        within = (m for m in marks if isinstance(m, int | float) and low < m < high)
        places = sorted({low, *within, high})
        places += [(a + b) / 2 for a, b in itertools.pairwise(places)]
        if step is not None:
            counts = (f((p - low) / step) for p in places for f in (math.floor, math.ceil))
            places = [value for n in counts if (value := _nth(low, step, n)) <= high]
        return list(dict.fromkeys([*self.ends(), *places]))

    def count(self) -> int | None:
        """The number of values; None: there is no finite number."""
        match self.distribution:
            case CategoricalDistribution() as chosen:
                return len(chosen.choices)
            case IntDistribution() as numbers:
                return (numbers.high - numbers.low) // numbers.step + 1
            case FloatDistribution(step=float() as step) as numbers:
                return round((numbers.high - numbers.low) / step) + 1
        return None

    def all(self) -> list[Any] | None:
        """Every value; None: there is no finite number."""
        match self.distribution:
            case CategoricalDistribution() as chosen:
                return list(chosen.choices)
            case IntDistribution() as numbers:
                return list(range(numbers.low, numbers.high + 1, numbers.step))
            case FloatDistribution(step=float() as step) as numbers:
                return [_nth(numbers.low, step, i) for i in range(self.count() or 0)]
        return None

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Draw a value with Optuna's sampler."""
        match self.distribution:
            case CategoricalDistribution() as d:
                return trial.suggest_categorical(name, d.choices)
            case IntDistribution() as d:
                return trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
            case FloatDistribution() as d:
                return trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)
        raise AssertionError(self.distribution)


def _nth(low: float, step: float, n: int) -> float:
    """`low + n * step` in decimals."""
    if isinstance(step, int):
        return low + n * step
    return float(Decimal(str(low)) + n * Decimal(str(step)))


def parse_range(key: str, text: Any) -> Range:
    """A range from its text. Raises ConfigError, which names sweep.params.KEY and the text."""
    where = f"sweep.params.{key}={text}"
    if not isinstance(text, str):
        raise ConfigError(f"{where}: it must be a text such as choice(3,5,7) or range(1,5)")
    try:
        parsed = OverridesParser.create().parse_override(f"x={text}").value()
    except HydraException as error:
        raise ConfigError(f"{where}: {first_line(error)}") from error
    if not isinstance(parsed, Sweep):
        raise ConfigError(
            f"{where}: it must be a choice(...), range(...) or interval(...), "
            "perhaps inside int(...) or tag(log, ...)"
        )
    if unknown := parsed.tags - {"log"}:
        raise ConfigError(f"{where}: the tag {', '.join(sorted(unknown))} is unknown; use log")
    if getattr(parsed, "shuffle", False):
        raise ConfigError(f"{where}: the sampler decides the order; leave shuffle() out")
    try:
        return _range(parsed, "log" in parsed.tags)
    except (ValueError, HydraException) as error:
        raise ConfigError(f"{where}: {first_line(error)}") from error


def range_text(key: str, given: Any) -> Any:
    """The text of a range that was given in Python; anything else is returned as it is.

    Args:
        key: Of the parameter, for messages.
        given: One of Optuna's distributions; a list, tuple or `range` of values to choose from; or
            a mapping of these by the last parts of their keys.

    Raises:
        ConfigError: It holds a value that a configuration cannot hold.
    """
    match given:
        case Mapping():
            return {part: range_text(f"{key}.{part}", inner) for part, inner in given.items()}
        case CategoricalDistribution(choices=choices):
            return _choice_text(key, choices)
        case list() | tuple() | range():
            return _choice_text(key, given)
        case IntDistribution() | FloatDistribution() if given.single():
            return _choice_text(key, [given.low])
        case (
            IntDistribution(low=low, high=high, step=1)
            | FloatDistribution(low=low, high=high, step=None)
        ):
            text = f"interval({low!r},{high!r})"
            text = f"int({text})" if isinstance(low, int) else text
            return f"tag(log, {text})" if given.log else text
        case (
            IntDistribution(low=low, high=high, step=step)
            | FloatDistribution(low=low, high=high, step=step)
        ):
            end = Decimal(str(high)) + Decimal(str(step))  # a range does not include its end
            return f"range({low!r},{end},{step!r})"
    return given


def _choice_text(key: str, values: Iterable[Any]) -> str:
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    for value in values:
        if not _is_plain(value):
            raise ConfigError(
                f"sweep.params.{key}: {value!r} is a {type(value).__name__}; choose among numbers, "
                "texts, bools, None, and lists and mappings of these"
            )
    text = ",".join(hydra_text(value) for value in values)
    return text if len(values) > 1 else f"choice({text})"  # choice() does not take null


def _is_plain(value: Any) -> bool:
    match value:
        case list() | tuple():
            return all(_is_plain(item) for item in value)
        case dict():
            return all(isinstance(k, str) and _is_plain(item) for k, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _range(parsed: Sweep, log: bool) -> Range:
    match parsed:
        case ChoiceSweep():
            if log:
                raise ValueError("log is for numbers between two ends, not for a choice")
            return _choice([_plain(item) for item in parsed.list])
        case IntervalSweep(start=low, end=high):
            assert low is not None
            assert high is not None
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError("both ends must be finite")
            if not low < high:
                raise ValueError(f"there is nothing between {low} and {high}")
            if isinstance(low, int) and isinstance(high, int):
                return Range(IntDistribution(low, high, log=log), {})
            return Range(FloatDistribution(float(low), float(high), log=log), {})
        case RangeSweep(start=int() as start, stop=int() as stop, step=int() as step):
            whole = range(start, stop, step)
            if not whole:
                raise ValueError(_empty(start, stop, step))
            low, high = sorted((whole[0], whole[-1]))
            return Range(IntDistribution(low, high, step=abs(step), log=log), {})
        case RangeSweep(start=float() | int() as start, stop=float() | int() as stop, step=step):
            if log:
                raise ValueError("log and a step exclude each other; use interval(...)")
            first, last = _ends(start, stop, step)
            low, high = sorted((first, last))
            return Range(FloatDistribution(low, high, step=float(abs(step))), {})
    raise ValueError("it must be a choice, a range or an interval")


def _ends(start: float, stop: float, step: float) -> tuple[float, float]:
    """The first and the last value of a range of floats. Raises ValueError.

    In decimals, as the numbers are written: in binary floats, range(0.1,0.4,0.1) would contain 0.4.
    """
    first, end, by = (Decimal(str(number)) for number in (start, stop, step))
    if not all(number.is_finite() for number in (first, end, by)) or by == 0:
        raise ValueError("the numbers must be finite, and the step must not be 0")
    steps = (end - first) / by
    if steps > MAX_STEPS:
        raise ValueError(f"it has more than {MAX_STEPS:,} values; use interval(...)")
    if steps <= 0:
        raise ValueError(_empty(start, stop, step))
    return float(first), float(first + (math.ceil(steps) - 1) * by)


def _empty(start: float, stop: float, step: float) -> str:
    if (stop - start) * step < 0:
        return (
            f"it is empty, since steps of {step} do not lead from {start} to {stop}; "
            f"write range({start},{stop},{-step})"
        )
    return "it is empty, since the end is not part of a range"


def _choice(items: list[Any]) -> Range:
    """Optuna stores only plain values; it stores a list or a mapping as its text.

    It finds a value among the choices by ==. So choices that are equal but not the same (1, 1.0
    and true) are stored as texts, too, and all others with them, since a text may look the same.
    """
    texts = [hydra_text(item) for item in items]
    if twice := [text for i, text in enumerate(texts) if text in texts[:i]]:
        raise ValueError(f"{twice[0]} is there twice")
    stored = [str(item) if isinstance(item, list | dict) else item for item in items]
    if any(a == b for a, b in itertools.combinations(stored, 2)):
        stored = texts
    values = {key: item for key, item in zip(stored, items, strict=True) if isinstance(key, str)}
    return Range(CategoricalDistribution(stored), values)


def _plain(item: Any) -> Any:
    match item:
        case QuotedString():
            return item.text
        case list():
            return [_plain(part) for part in item]
        case dict():
            return {_plain(key): _plain(part) for key, part in item.items()}
    return item
