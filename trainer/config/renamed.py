"""Settings that have a new name. The old name works for one release and prints one line."""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

KEYS = {
    "artifact.numbers": "artifact.dtype",
    "sweep.during": "sweep.trial_overrides",
    "sweep.exchange": "sweep.size_weight",
    "sweep.prefix": "sweep.shared_phases",
}
TARGETS = {
    "trainer.data.mnist.mnist": "trainer.data.mnist",
    "trainer.data.text.text": "trainer.data.text",
    "trainer.data.dataset.dataset": "trainer.data.dataset",
}
_OVERRIDE = re.compile(r"([+~]{0,2})([^=]+)(.*)", re.DOTALL)


def announce(old: str, new: str) -> None:
    """Print that a setting has a new name, to standard error."""
    print(f"{old} is now called {new}; the old name works until the next release", file=sys.stderr)


def rename_override(argument: str, notify: Callable[[str, str], None] = announce) -> str:
    """An override of the command line, such as `sweep.during.seed=1`, with the key's new name."""
    matched = _OVERRIDE.fullmatch(argument)
    if matched is None:
        return argument
    sign, key, rest = matched.groups()
    for old, new in KEYS.items():
        if key == old or key.startswith(f"{old}."):
            notify(old, new)
            return f"{sign}{new}{key.removeprefix(old)}{rest}"
    return argument


def rename_keys(
    settings: Mapping[str, Any], notify: Callable[[str, str], None] = announce
) -> dict[str, Any]:
    """A copy of plain settings in which all keys and targets have their new names."""
    renamed: dict[str, Any] = _rename_targets(settings)
    for old, new in KEYS.items():
        section, old_key = old.split(".")
        new_key = new.split(".")[1]
        values = renamed.get(section)
        if isinstance(values, dict) and old_key in values:
            notify(old, new)
            value, present = values.pop(old_key), values.get(new_key)
            both = isinstance(value, Mapping) and isinstance(present, Mapping)
            values[new_key] = {**dict(present or {}), **value} if both else value
    return renamed


def _rename_targets(value: Any) -> Any:
    match value:
        case Mapping():
            return {
                key: TARGETS.get(item, item)
                if key == "_target_" and isinstance(item, str)
                else _rename_targets(item)
                for key, item in value.items()
            }
        case list():
            return [_rename_targets(item) for item in value]
    return value
