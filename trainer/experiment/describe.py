"""Describes Python objects by settings, as config.yaml stores them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.utils import get_method
from torch import nn

from trainer.config import ArtifactConfig
from trainer.config.compose import choose, conf_dir
from trainer.config.instantiate import OBJECT
from trainer.errors import ConfigError
from trainer.phases import Phase
from trainer.phases.structure import class_path
from trainer.tasks import Task


def describe_parts(
    objects: dict[str, Any],
    *,
    model: Any = None,
    data: Any = None,
    task: str | Task | Callable[..., Task] | Mapping[str, Any] | None = None,
    phases: Sequence[Phase] | Mapping[str, Phase] = (),
    logger: str | Sequence[str] | Mapping[str, Any] | None = None,
    artifact: bool | ArtifactConfig | Mapping[str, Any] = False,
) -> dict[str, Any]:
    """Settings of those arguments of `Experiment` that may be Python objects.

    Args:
        objects: Gets the objects, and the classes that cannot be imported, by the names under
            which the settings refer to them.
        model, data, task, phases, logger, artifact: As for `Experiment`; None: not given.
    """
    return {
        **({} if model is None else {"model": describe_object("model", model, objects)}),
        **({} if data is None else {"data": describe_object("data", data, objects)}),
        **({} if task is None else {"task": _describe_task(task, objects)}),
        "phases": {
            name: _describe_phase(name, phase, objects) for name, phase in _by_name(phases).items()
        },
        "logger": {
            name: describe_object(f"logger.{name}", sink, objects)
            for name, sink in describe_section("logger", logger).items()
        },
        "artifact": _describe_artifact(artifact, objects),
    }


def describe_section(key: str, section: Any) -> dict[str, Any]:
    """Settings of a section of the configuration.

    Args:
        key: Its name.
        section: A dataclass, a mapping, the name (or names) that `key=NAME` selects on the command
            line, or None.

    Raises:
        ConfigError: It is none of these, or nothing has that name.
    """
    if section is None:
        return {}
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        return dataclasses.asdict(section)
    if isinstance(section, Mapping):
        return dict(section)
    names = [section] if isinstance(section, str) else section
    if key == "logger" and isinstance(names, list | tuple) and not names:
        return {}
    if not (
        names
        and (conf_dir() / key).is_dir()
        and isinstance(names, Sequence)
        and all(isinstance(name, str) for name in names)
    ):
        raise ConfigError(f"{key}={section!r}: pass a mapping of the settings of this section")
    return choose(key, section)


def describe_cluster(cluster: Any, workers: int | None) -> dict[str, Any]:
    """Settings of the section `cluster`, in which `workers` overrides the number of workers."""
    settings = describe_section("cluster", cluster)
    if workers is None and settings.get("backend") == "inline":
        workers = settings.get("workers", 1)
    return settings if workers is None else {**settings, "workers": workers}


def _by_name(phases: Sequence[Phase] | Mapping[str, Phase]) -> dict[str, Phase]:
    """Phases by name; in a sequence they are named after their kind: train, prune, prune_2."""
    if isinstance(phases, Mapping):
        return dict(phases)
    if not isinstance(phases, Sequence) or isinstance(phases, str):
        raise ConfigError(
            f"phases is a {type(phases).__name__}: pass a list or a mapping of phases, such as "
            "[Train(epochs=2)]"
        )
    named: dict[str, Phase] = {}
    for phase in phases:
        kind = getattr(phase, "kind", type(phase).__name__.lower())
        number = 1
        while (name := kind if number == 1 else f"{kind}_{number}") in named:
            number += 1
        named[name] = phase
    return named


def describe_object(key: str, value: Any, objects: dict[str, Any]) -> dict[str, Any]:
    """Settings that describe what was passed for `key`.

    Callables are described by their dotted path and arguments; one that other processes cannot
    import is added to `objects` by that path. Anything else is added as it is.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        return dict(value)
    function, arguments = value, {}
    if isinstance(value, functools.partial) and not value.args:
        function, arguments = value.func, value.keywords
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    named = callable(function) and module and name and not isinstance(function, nn.Module)
    if named and _is_plain(arguments):
        path = f"{module}.{name}"
        if not _can_import(path, function):
            objects[path] = function
        return {"_target_": path, **arguments}
    objects[key] = value
    return {OBJECT: key}


def _describe_phase(name: str, phase: Phase, objects: dict[str, Any]) -> dict[str, Any]:
    """Settings of a phase that was passed as an object."""
    if not isinstance(phase, Phase):
        raise ConfigError(
            f"phases: {name} is a {type(phase).__name__}; pass objects of subclasses of Phase, "
            "such as Train(epochs=2)"
        )
    return _describe_dataclass(f"phases.{name}", phase, objects)


def _describe_task(task: Any, objects: dict[str, Any]) -> dict[str, Any]:
    """Settings of a task that was passed as an object, a class, or a mapping."""
    if isinstance(task, str):
        return choose("task", task)
    if not isinstance(task, Task):
        settings = isinstance(task, Mapping) and "_target_" in task
        if isinstance(task, nn.Module) or not (settings or callable(task)):
            raise ConfigError(
                f"task is a {type(task).__name__}: pass a name, such as 'regression', an object "
                "of a class of trainer.tasks, or a mapping with a _target_; a loss is passed as "
                "trainer.tasks.Custom(loss=...)"
            )
        return describe_object("task", task, objects)
    if not dataclasses.is_dataclass(task):
        objects["task"] = task
        return {OBJECT: "task"}
    return _describe_dataclass("task", task, objects)


def _describe_dataclass(key: str, value: Any, objects: dict[str, Any]) -> dict[str, Any]:
    """Settings of an object of a dataclass; the object itself if they are not all plain values."""
    settings = {}
    for field in dataclasses.fields(value):
        if field.init:
            item = getattr(value, field.name)
            is_dataclass = dataclasses.is_dataclass(item) and not isinstance(item, type)
            settings[field.name] = dataclasses.asdict(item) if is_dataclass else item
    kind = type(value)
    if not _is_plain(settings):
        objects[key] = value
        return {OBJECT: key}
    path = class_path(kind)
    if not _can_import(path, kind):
        objects[path] = kind
    return {"_target_": path, **settings}


def _describe_artifact(
    artifact: bool | ArtifactConfig | Mapping[str, Any], objects: dict[str, Any]
) -> dict[str, Any]:
    """Settings of the section `artifact`, in which a coder may have been passed as an object."""
    if isinstance(artifact, bool):
        return {"make": artifact}
    if dataclasses.is_dataclass(artifact):
        artifact = {
            field.name: getattr(artifact, field.name) for field in dataclasses.fields(artifact)
        }
    elif isinstance(artifact, Mapping):
        artifact = {"make": True, **artifact}
    else:
        raise ConfigError(
            f"artifact={artifact!r}: pass True, False, or a mapping of the settings of this section"
        )
    coder = artifact.get("coder", "auto")
    described = coder if _is_plain(coder) else describe_object("artifact.coder", coder, objects)
    return {**artifact, "coder": described}


def _can_import(path: str, wanted: Any) -> bool:
    """Whether other processes get `wanted` by importing `path`."""
    if path.startswith("__main__.") or "<locals>" in path:
        return False
    try:
        return get_method(path) is wanted
    except Exception:  # importing may raise anything
        return False


def _is_plain(value: Any) -> bool:
    """Whether a configuration file can hold a value."""
    match value:
        case None | bool() | int() | float() | str():
            return True
        case Mapping():
            return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
        case list() | tuple():
            return all(_is_plain(item) for item in value)
    return False
