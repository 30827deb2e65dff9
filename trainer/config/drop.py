"""The allowed drop of a metric below the dense model's: an amount, or a percentage."""

import math
from typing import Any

from trainer.errors import ConfigError


def check_drop(key: str, value: Any) -> None:
    """Raise ConfigError for a drop that is neither a number of at least 0 nor such as "5%".

    None is accepted: it means that the setting is not set.
    """
    if value is None:
        return
    try:
        amount = _amount(value)
    except (TypeError, ValueError):
        amount = math.nan
    wrong_type = isinstance(value, bool) or (isinstance(value, str) and not is_relative(value))
    if wrong_type or not (math.isfinite(amount) and amount >= 0):
        raise ConfigError(
            f"{key}={value!r}: it must be a number of at least 0, in units of the metric, or a "
            'percentage of the dense model\'s value, such as "5%"'
        )


def is_relative(drop: float | str) -> bool:
    """Whether a drop is a percentage of the dense model's value."""
    return isinstance(drop, str) and drop.strip().endswith("%")


def exceeds(drop: float | str, other: float | str) -> bool:
    """Whether a drop allows more than another one; False if they cannot be compared."""
    return is_relative(drop) == is_relative(other) and _amount(drop) > _amount(other)


def part_of(drop: float | str, fraction: float) -> float | str:
    """A fraction of a drop."""
    amount = _amount(drop) * fraction
    return f"{amount:.6g}%" if is_relative(drop) else amount


def worst_allowed(baseline: float, drop: float | str, direction: str) -> float:
    """The worst value of a metric that a drop allows.

    Args:
        baseline: Value of the dense model.
        drop: As `check_drop` accepts it.
        direction: Of the metric: "maximize" or "minimize".
    """
    allowed = _amount(drop)
    if is_relative(drop):
        allowed *= abs(baseline) / 100
    return baseline - allowed if direction == "maximize" else baseline + allowed


def is_worse(value: float, limit: float, direction: str, rounding: float = 0.0) -> bool:
    """Whether a value of a metric is worse than a limit by more than `rounding`; NaN is."""
    if direction == "maximize":
        return not value >= limit - rounding
    return not value <= limit + rounding


def _amount(drop: Any) -> float:
    return float(drop.strip().removesuffix("%")) if isinstance(drop, str) else float(drop)
