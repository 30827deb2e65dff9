"""From a mapping with a `_target_` to the object that it names, every mistake a ConfigError."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate

from trainer.errors import ConfigError, first_line

T = TypeVar("T")


def target(key: str, settings: Mapping[str, Any]) -> Any:
    """The class or function that `settings["_target_"]` names. Raises ConfigError."""
    path = settings.get("_target_")
    if not path:
        raise ConfigError(
            f"{key}._target_ is missing: name an importable class, package.module.Class"
        )
    try:
        return get_method(str(path))
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise ConfigError(f"{key}._target_={path}: it cannot be imported: {reason}") from error


def check_arguments(key: str, made: Any, settings: Mapping[str, Any]) -> None:
    """Hold settings against the signature of what they are for. Raises ConfigError."""
    accepted = _accepted(made)
    for name in settings:
        if not (name.startswith("_") or accepted is None or name in accepted):
            known = ", ".join(accepted) or "no settings"
            raise ConfigError(f"{key}.{name}: unknown; {made.__name__} takes {known}")


def build(key: str, settings: Mapping[str, Any], expected: type[T], **extra: Any) -> T:
    """Call the target with its settings, nested targets first.

    Args:
        key: the settings' place in the configuration, for messages.
        settings: `_target_` and keyword arguments.
        expected: what the result must be an instance of.
        extra: arguments of ours, passed where the target takes them and the settings do not.

    Raises:
        ConfigError: not importable, wrong arguments, a value that the target refuses, or a result
            that is no `expected`.
    """
    made = target(key, settings)
    check_arguments(key, made, settings)
    accepted = _accepted(made)
    ours = {name: value for name, value in extra.items() if accepted is None or name in accepted}
    try:
        result = instantiate({**ours, **settings}, _convert_="all")
    except InstantiationException as error:
        raise ConfigError(f"{key} ({made.__name__}): {error.__cause__ or error}") from error
    if not isinstance(result, expected):
        raise ConfigError(
            f"{key}._target_={settings['_target_']}: it made a {type(result).__name__}, "
            f"but a {expected.__name__} is needed"
        )
    return result


def _accepted(made: Any) -> list[str] | None:
    """Names of the keyword arguments that a callable takes; None where it takes any."""
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):  # some built-in classes have none
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return list(parameters)
