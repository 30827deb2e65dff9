"""From a mapping with a `_target_` to the object that it names, every mistake a ConfigError."""

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast

from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from trainer.errors import ConfigError, first_line

T = TypeVar("T")


def typed(schema: type[T], settings: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `schema` from plain settings, every key and type checked.

    Args:
        schema: a dataclass, not frozen (OmegaConf could not fill it in); its `__post_init__` may
            check values.
        settings: what a configuration file says; nested mappings become nested dataclasses.
        where: dotted key of the settings, for messages.

    Raises:
        ConfigError: names the key, its value, and what is known or expected.
    """
    try:
        merged = OmegaConf.merge(_structured(cast(Hashable, schema)), dict(settings))
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = ".".join(part for part in (where, str(error.full_key or "")) if part)
        message = f"{key}: {str(error).splitlines()[0]}"
        if isinstance(error, ConfigKeyError) and is_dataclass(error.object_type):
            message += f"; known keys: {', '.join(_keys(error.object_type))}"
        raise ConfigError(message) from error
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}" if where else str(error)) from error


@cache
def _structured(schema: Hashable) -> Any:
    """What OmegaConf knows of a dataclass; a merge copies it."""
    return OmegaConf.structured(schema)


def _keys(schema: Any) -> list[str]:
    return [field.name for field in fields(schema) if field.init]


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
