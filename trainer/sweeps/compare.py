"""Comparisons in the configuration: conditions of parameters, and constraints."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from trainer.errors import ConfigError

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"\s*([^\s<>=!]*)\s*(>=|<=|==|!=|>|<)\s*(\S.*?)\s*")


@dataclass(frozen=True)
class Comparison:
    """`left operator right`, where left is the name of a value."""

    left: str
    operator: str
    right: Any

    def holds(self, value: Any) -> bool:
        """Whether it is true of `value`. Raises TypeError where the two cannot be ordered.

        A bool equals no number, although Python considers true and 1 equal.
        """
        if self.operator in ("==", "!=") and isinstance(value, bool) != isinstance(
            self.right, bool
        ):
            return self.operator == "!="
        return bool(OPERATORS[self.operator](value, self.right))


def parse_condition(key: str, text: str) -> list[Comparison]:
    """`model.depth >= 2 and optimizer.nesterov == true`: all of them must hold.

    Args:
        key: key of the text, for messages.
        text: the comparisons.

    Raises:
        ConfigError: the text is not a comparison.
    """
    return [_parse(key, part, "KEY >= VALUE") for part in re.split(r"\s+and\s+", text)]


def parse_bound(key: str, text: str) -> Comparison:
    """`>= 0.98`: a bound on the measure `key`. Raises ConfigError."""
    bound = _parse(key, text, '">= 0.98"')
    if bound.left or bound.operator not in (">=", "<=") or not _is_number(bound.right):
        raise ConfigError(f"{key}={text}: it must be >= or <= and a number")
    return bound


def excess(bound: Comparison, value: float) -> float:
    """By how much `value` violates a bound of `parse_bound`; 0 or less: it does not."""
    over = value - float(bound.right)
    return over if bound.operator == "<=" else -over


def satisfied(conditions: list[Comparison], values: Mapping[str, Any]) -> bool:
    """Whether all conditions hold. A condition on a name without a value does not."""
    return all(c.left in values and c.holds(values[c.left]) for c in conditions)


def _parse(key: str, text: str, example: str) -> Comparison:
    matched = _COMPARISON.fullmatch(text)
    if matched is None:
        raise ConfigError(f"{key}={text}: it must be a comparison such as {example}")
    try:
        right = yaml.safe_load(matched[3])
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text}: {matched[3]} is not a YAML value") from error
    return Comparison(matched[1], matched[2], right)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
