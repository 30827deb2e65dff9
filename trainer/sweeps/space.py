"""The space that a sweep searches: parameters, their ranges, and the conditions on them.

The value of a key of `sweep.lengths` is a list. Each of its elements is a parameter (model.width.0,
model.width.1, ...) that is drawn if the list is long enough.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna

from trainer.config import SweepConfig
from trainer.errors import ConfigError
from trainer.sweeps.compare import Comparison, parse_condition, satisfied
from trainer.sweeps.ranges import Range, parse_range

GRID_LIMIT = 100_000  # combinations

Drawn = Mapping[str, Any]
"""The values that Optuna stores, by parameter name: `trial.params`. See `Range.value`."""


@dataclass(frozen=True)
class Parameter:
    """One value that is drawn."""

    name: str  # the key; of an element of a list with its index: model.width.0
    key: str
    range: Range
    conditions: list[Comparison]  # on parameters that are drawn earlier


class Space:
    """All parameters, each after those that its conditions are about."""

    def __init__(self, parameters: Sequence[Parameter], lists: Mapping[str, list[Comparison]]):
        """Args: lists: keys whose value is a list, and the conditions on the list as a whole."""
        self.parameters = parameters
        self._lists = lists
        self._by_name = {parameter.name: parameter for parameter in parameters}

    @property
    def conditional(self) -> bool:
        """Whether some parameters are not drawn in every trial."""
        return any(parameter.conditions for parameter in self.parameters)

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Draw the parameters that a trial does not have. Returns all its parameters."""
        drawn: dict[str, Any] = {}
        for parameter in self.parameters:
            if self._active(parameter, drawn):
                drawn[parameter.name] = parameter.range.suggest(trial, parameter.name)
        return drawn

    def settings(self, drawn: Drawn) -> dict[str, Any]:
        """The values of configuration keys, with the elements of lists collected."""
        values = self.values(drawn)
        settings: dict[str, Any] = {
            key: [] for key, conditions in self._lists.items() if satisfied(conditions, values)
        }
        for parameter in self.parameters:
            if parameter.name in drawn:
                if parameter.key in self._lists:
                    settings[parameter.key].append(values[parameter.name])
                else:
                    settings[parameter.key] = values[parameter.name]
        return settings

    def ends(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Draws to validate: for every end of every range one, with the name of its parameter."""
        seen = []
        for parameter in self.parameters:
            for value in parameter.range.ends():
                for drawn in self._draws({parameter.name: value}):
                    if parameter.name in drawn:
                        if drawn not in seen:
                            seen.append(drawn)
                            yield parameter.name, drawn
                        break

    def grid(self, limit: int) -> list[dict[str, Any]]:
        """Every combination once. Raises ConfigError for more than `limit`."""
        combinations: list[dict[str, Any]] = [{}]
        for parameter in self.parameters:
            count = parameter.range.count()
            if count is None:
                raise ConfigError(
                    f"sweep.params.{parameter.key}: it has infinitely many values, which "
                    "sweep.sampler=grid needs: use a range with a step or a choice, or "
                    "another sampler"
                )
            active = [self._active(parameter, drawn) for drawn in combinations]
            if sum(count if drawn_here else 1 for drawn_here in active) > limit:
                raise ConfigError(
                    f"sweep.sampler=grid: there are more than {limit:,} combinations; "
                    "search fewer values, or use another sampler"
                )
            values = (parameter.range.all() or []) if any(active) else []
            combinations = [
                longer
                for drawn, drawn_here in zip(combinations, active, strict=True)
                for longer in (
                    [drawn | {parameter.name: value} for value in values] if drawn_here else [drawn]
                )
            ]
        return combinations

    def _active(self, parameter: Parameter, drawn: Drawn) -> bool:
        return satisfied(parameter.conditions, self.values(drawn))

    def values(self, drawn: Drawn) -> dict[str, Any]:
        """The value of each parameter that was drawn, by its name."""
        return {name: self._by_name[name].range.value(stored) for name, stored in drawn.items()}

    def _draws(self, wanted: Drawn) -> Iterator[dict[str, Any]]:
        """Draws with the value of one parameter, and the others at the low ends of their ranges.

        Parameters that its conditions compare take all values that may decide them.
        """
        (name,) = wanted
        line = self._ancestors(name)
        marks = [c for p in self.parameters if p.name in {name, *line} for c in p.conditions]
        parents = [p for p in self.parameters if p.name in line]
        tried = (p.range.around(c.right for c in marks if c.left == p.name) for p in parents)
        for values in itertools.product(*tried):
            fixed = dict(zip((p.name for p in parents), values, strict=True)) | dict(wanted)
            drawn: dict[str, Any] = {}
            for parameter in self.parameters:
                if self._active(parameter, drawn):
                    low = parameter.range.ends()[0]
                    drawn[parameter.name] = fixed.get(parameter.name, low)
            yield drawn

    def _ancestors(self, name: str) -> set[str]:
        direct = {c.left for c in self._by_name[name].conditions}
        return direct.union(*(self._ancestors(parent) for parent in direct))


def parse_space(cfg: SweepConfig, defaults: Mapping[str, Any]) -> Space:
    """The space that `sweep.params`, `sweep.lengths` and `sweep.conditions` describe.

    Args:
        defaults: values of the configuration by dotted key, for lengths that are not searched.

    Raises:
        ConfigError: The message names the key, the text and a correct one.
    """
    texts = flatten(cfg.params, "sweep.params")
    ranges = {key: parse_range(key, text) for key, text in texts.items() if text is not None}
    if not ranges:
        raise ConfigError("sweep.params: it is empty, so there is nothing to search")
    conditions = {
        key: parse_condition(f"sweep.conditions.{key}", text)
        for key, text in flatten(cfg.conditions, "sweep.conditions").items()
    }
    lengths = flatten(cfg.lengths, "sweep.lengths")
    for where, keys in (("conditions", conditions), ("lengths", lengths)):
        for key in keys:
            if key not in texts:
                raise ConfigError(f"sweep.{where}.{key}: sweep.params does not search it")
    parameters: list[Parameter] = []
    for key, found in ranges.items():
        if key in lengths:
            parameters += _elements(key, found, lengths[key], ranges, defaults)
        else:
            parameters.append(Parameter(key, key, found, []))
    parameters = [
        replace(p, conditions=conditions.get(p.key, []) + p.conditions) for p in parameters
    ]
    lists = {
        key: conditions.get(key, []) + _length_drawn(length, ranges)
        for key, length in lengths.items()
        if key in ranges
    }
    return Space(_in_order(parameters), lists)


def flatten(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings by dotted key. Raises ConfigError if a key is given both dotted and nested."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = flatten(value, f"{where}.{key}") if isinstance(value, Mapping) else {"": value}
        for rest, leaf in nested.items():
            dotted = f"{key}.{rest}" if rest else str(key)
            if dotted in flat:
                raise ConfigError(f"{where}: {dotted} is given twice, dotted and nested")
            flat[dotted] = leaf
    return flat


def _elements(
    key: str, found: Range, length: Any, ranges: Mapping[str, Range], defaults: Mapping[str, Any]
) -> list[Parameter]:
    """One parameter for each element that the list `key` can have."""
    where = f"sweep.lengths.{key}={length}"
    if isinstance(length, str) and length in ranges:
        longest = ranges[length].all() or []
        if not all(type(value) is int for value in longest) or not longest:
            raise ConfigError(f"{where}: {length} must be searched among whole numbers")
        return [
            Parameter(f"{key}.{i}", key, found, [Comparison(length, ">", i)])
            for i in range(max(longest))
        ]
    count = defaults.get(length) if isinstance(length, str) else length
    if type(count) is not int or count < 1:
        raise ConfigError(f"{where}: it must be a number above 0, or a key that holds one")
    return [Parameter(f"{key}.{i}", key, found, []) for i in range(count)]


def _length_drawn(length: Any, ranges: Mapping[str, Range]) -> list[Comparison]:
    """The condition that the length of a list is drawn; otherwise its key keeps its value."""
    return [Comparison(length, "!=", None)] if length in ranges else []


def _in_order(parameters: list[Parameter]) -> list[Parameter]:
    """Sort parameters so that each follows those that its conditions are about."""
    names = {parameter.name for parameter in parameters}
    for parameter in parameters:
        for condition in parameter.conditions:
            if condition.left not in names:
                raise ConfigError(
                    f"sweep.conditions.{parameter.key}: {condition.left or 'it'} is not a "
                    f"parameter of this sweep; there are {', '.join(sorted(names))}"
                )
            _check_types(parameter, condition, parameters)
    ordered: list[Parameter] = []
    done: set[str] = set()
    while len(ordered) < len(parameters):
        ready = [
            p
            for p in parameters
            if p.name not in done and all(c.left in done for c in p.conditions)
        ]
        if not ready:
            stuck = sorted(names - done)
            raise ConfigError(f"sweep.conditions: {', '.join(stuck)} depend on each other")
        ordered.append(ready[0])
        done.add(ready[0].name)
    return ordered


def _check_types(parameter: Parameter, condition: Comparison, among: list[Parameter]) -> None:
    (parent,) = (p for p in among if p.name == condition.left)
    for end in parent.range.ends():
        try:
            condition.holds(parent.range.value(end))
        except TypeError as error:
            raise ConfigError(
                f"sweep.conditions.{parameter.key}: {condition.left} {condition.operator} "
                f"{condition.right}: these cannot be ordered"
            ) from error
