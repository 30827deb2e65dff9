"""Builds objects from settings: dataclasses, and instances of a `_target_`.

Every mistake is a ConfigError that names the key, its value and what is expected.
"""

import copy
import difflib
import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Generic, TypeVar, cast, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from trainer.errors import ConfigError, described, first_line

T = TypeVar("T")

# Hydra prints why a target cannot be imported, which the ConfigError says already.
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)

OBJECT = "_object_"
"""Settings `{_object_: NAME}` stand for a Python object that was passed to the library."""


# Messages of OmegaConf.
_WRONG_TYPE = re.compile(
    r"Value '(?P<value>.*)' "
    r"(?:of type '\w+' could not be converted to (?P<kind>Integer|Float)|is not a valid bool)"
)
_KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}


def to_dataclass(schema: type[T], settings: Mapping[str, Any], key: str = "") -> T:
    """Build a dataclass from plain settings, with every key and type checked.

    Args:
        schema: A dataclass that is not frozen. Its `__post_init__` may check values and raise
            ConfigError.
        settings: Plain values by field name; nested mappings become nested dataclasses.
        key: Dotted key of the settings in the configuration, for messages.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type or is not allowed.
    """
    try:
        merged = OmegaConf.merge(_structured(cast(Hashable, schema)), dict(settings))
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        full_key = ".".join(part for part in (key, str(error.full_key or "")) if part)
        if isinstance(error, ConfigKeyError) and is_dataclass(error.object_type):
            known = ", ".join(_field_names(error.object_type))
            message = f"{full_key}: there is no such setting; known keys: {known}"
        elif not error.full_key and (found := _not_a_mapping(schema, settings, key)):
            message = found  # OmegaConf does not say where
        elif "is not a ListConfig" in str(error):
            message = f"{full_key}: it must be a list, such as [a, b]"
        elif "is not Optional" in str(error) or "Incompatible value 'None'" in str(error):
            message = f"{full_key}=null: it must have a value"
        elif isinstance(error, MissingMandatoryValue) and full_key:
            message = f"{full_key} is missing"
        elif str(error).startswith("Cannot assign ") and " to Dict[" in str(error):
            message = f"{full_key}: it must be a mapping"
        elif full_key and (wrong := _WRONG_TYPE.match(str(error))):
            message = f"{full_key}={wrong['value']}: it must be {_KINDS[wrong['kind'] or 'bool']}"
        else:
            message = ": ".join(part for part in (full_key, str(error).splitlines()[0]) if part)
        raise ConfigError(message) from error
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}" if key else str(error)) from error


@cache
def _structured(schema: Hashable) -> Any:
    """OmegaConf's view of a dataclass. A merge copies it, so it can be cached."""
    return OmegaConf.structured(schema)


def _not_a_mapping(schema: Any, settings: Mapping[str, Any], key: str) -> str:
    """The message about a setting that must be a mapping and is none; "" if there is none."""
    types = get_type_hints(schema)
    for name, value in settings.items():
        path = f"{key}.{name}" if key else name
        if is_dataclass(types.get(name)):
            if not isinstance(value, Mapping):
                known = ", ".join(_field_names(types[name]))
                return f"{path}={value}: it must be a mapping with settings among {known}"
            if found := _not_a_mapping(types[name], value, path):
                return found
    return ""


def _field_names(schema: Any) -> list[str]:
    return [field.name for field in fields(schema) if field.init]


def locate(key: str, settings: Mapping[str, Any], objects: Mapping[str, Any]) -> Any:
    """Return the class or function that `settings["_target_"]` names.

    Args:
        key: Dotted key of the settings, for messages.
        settings: Settings with a `_target_`.
        objects: Classes and functions by dotted path that cannot be imported, such as those
            defined in a notebook.

    Raises:
        ConfigError: There is no `_target_`, or it cannot be imported.
    """
    path = settings.get("_target_")
    if not path:
        raise ConfigError(
            f"{key}._target_ is missing: name an importable class, package.module.Class"
        )
    if path in objects:
        return objects[path]
    try:
        return get_method(str(path))
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        module, _, name = str(path).rpartition(".")
        if module in sys.modules and not hasattr(sys.modules[module], name):
            close = difflib.get_close_matches(name, dir(sys.modules[module]), 1)
            reason = f"{module} has no {name}" + (f"; did you mean {close[0]}?" if close else "")
        raise ConfigError(f"{key}._target_={path}: it cannot be imported: {reason}") from error


def check_arguments(key: str, function: Any, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that `function` does not accept as an argument."""
    accepted = _parameter_names(function)
    for name in settings:
        if not (name.startswith("_") or accepted is None or name in accepted):
            known = ", ".join(accepted) or "no settings"
            raise ConfigError(f"{key}.{name}: unknown; {function.__name__} takes {known}")


@dataclass(frozen=True)
class Factory(Generic[T]):
    """Builds one part of an experiment, as often as it is needed.

    The part is described by settings with a `_target_`, or by `{_object_: NAME}` for an object
    that was passed to the library.

    Raises:
        ConfigError: The target cannot be imported, or does not accept the settings.
    """

    key: str  # dotted key of the settings, for messages
    settings: Mapping[str, Any]
    expected: type[T]  # class of the built object
    objects: Mapping[str, Any] = field(default_factory=dict, repr=False)
    copy: Callable[[Any], Any] = field(default=copy.deepcopy, repr=False)  # of a given object

    def __post_init__(self) -> None:
        if not self.is_object:
            check_arguments(self.key, locate(self.key, self.settings, self.objects), self.settings)

    @property
    def is_object(self) -> bool:
        """Whether the part is a given object rather than built from settings."""
        return OBJECT in self.settings

    @property
    def given(self) -> T:
        """The given object itself. Raises ConfigError if it is of another type."""
        given = _given(self.key, self.settings, self.objects)
        if not isinstance(given, self.expected):
            raise ConfigError(
                f"{self.key}: an object of type {type(given).__name__} was passed, but a "
                f"{self.expected.__name__} is needed"
            )
        return given

    def build(self, **context: Any) -> T:
        """Build a fresh object; of a given object, a deep copy.

        Args:
            context: Further arguments, passed if the target accepts them and the settings do not
                set them.

        Raises:
            ConfigError: The target refuses a value, or returns an object of another type; or the
                given object cannot be copied.
        """
        if self.is_object:
            given = self.given
            try:
                copied: T = self.copy(given)
                return copied
            except Exception as error:  # its class may raise anything
                raise ConfigError(
                    f"{self.key}: the {type(given).__name__} that was passed cannot be copied: "
                    f"{described(error)}; pass the class or function that makes it instead"
                ) from error
        return build_object(self.key, self.settings, self.expected, self.objects, context)


def build_object(
    key: str,
    settings: Mapping[str, Any],
    expected: type[T],
    objects: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
) -> T:
    """Call a `_target_` with its settings; nested targets are built first.

    Args:
        key: Dotted key of the settings, for messages.
        settings: `_target_` and keyword arguments.
        expected: Class of which the result must be an instance.
        objects: As in `locate`.
        context: Further arguments, passed if the target accepts them and the settings do not set
            them.

    Raises:
        ConfigError: The target cannot be imported, does not accept the settings, raises an
            exception, which is the cause of the ConfigError, or returns an object of another type.
    """
    function = locate(key, settings, objects or {})
    check_arguments(key, function, settings)
    extra = accepted_context(function, settings, context or {})
    try:
        if settings["_target_"] in (objects or {}):
            # Hydra would import it by its name, which only the process that defined it can do.
            own = {name: value for name, value in settings.items() if name != "_target_"}
            partial = functools.partial(function, **instantiate(own, _convert_="all"))
        else:
            partial = instantiate({**settings, "_partial_": True}, _convert_="all")
        # The context is passed unchanged: a `_target_` in it does not belong to these settings.
        result = partial(**extra)
    except Exception as error:  # the target, or a nested one, may raise anything
        nested = isinstance(error, InstantiationException) and error.__cause__
        reason = nested or error
        raise ConfigError(f"{key} ({function.__name__}): {reason}") from reason
    if not isinstance(result, expected):
        raise ConfigError(
            f"{key}._target_={settings['_target_']}: it returned a {type(result).__name__}, "
            f"but a {expected.__name__} is needed"
        )
    return result


def accepted_context(
    function: Any, settings: Mapping[str, Any], context: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of `context` that a callable accepts and that its settings do not set."""
    accepted = _parameter_names(function)
    return {
        name: value
        for name, value in context.items()
        if name not in settings and (accepted is None or name in accepted)
    }


def _given(key: str, settings: Mapping[str, Any], objects: Mapping[str, Any]) -> Any:
    """The object that `{_object_: NAME}` stands for. Raises ConfigError if it was not passed."""
    name = settings[OBJECT]
    if name not in objects:
        raise ConfigError(
            f"{key}: it was passed as a Python object, which a configuration file cannot hold; "
            "resume the run from Python with trainer.resume(FOLDER)"
        )
    return objects[name]


def _parameter_names(function: Any) -> list[str] | None:
    """Names of the keyword arguments that a callable accepts; None if it accepts any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in classes have no signature
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return list(parameters)
