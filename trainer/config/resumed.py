"""Checks which code the configuration of a run directory may import when the run is resumed.

A run directory can come from anybody, and its config.yaml names the functions to call. It may name
those of installed packages, and those in folders that the user named: the folder in which the
command was started and PYTHONPATH. This limits accidents rather than attacks, since an installed
package may have a function that does harm: resume only runs that you trust.
"""

import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path
from typing import Any

from trainer.errors import ConfigError

_FOLDERS = ("working_dir", "py_modules")  # settings of cluster that name folders with code


def check_code(plain: Mapping[str, Any], folder: Path, named: Mapping[str, Any]) -> None:
    """Refuse a configuration that would import code which the user has not chosen.

    Args:
        plain: The configuration in the run directory.
        folder: The run directory.
        named: Settings of `cluster` that the user gave to resume the run.

    Raises:
        ConfigError: A target is in the standard library or in the run directory, or the
            configuration names folders with code that the user did not name again.
    """
    for key, target in _targets(plain, ""):
        module = target.partition(".")[0]
        paths = _locations(module)
        if module in sys.stdlib_module_names and any(map(_is_standard, paths)):
            raise ConfigError(
                f"resume={folder}: {key}={target}: a run directory cannot call Python's standard "
                "library, which could do anything; call it in a module of your own"
            )
        if any(_is_inside(path, folder) for path in paths):
            raise ConfigError(
                f"resume={folder}: {key}={target}: the module {module} is in the run directory, "
                "whose code is not imported; move it to the folder in which you start the command"
            )
    cluster = plain.get("cluster", {})
    for name in _FOLDERS:
        value = cluster.get(name) if isinstance(cluster, Mapping) else None
        if value and name not in named:
            raise ConfigError(
                f"resume={folder}: its configuration names a folder of code, cluster.{name}="
                f"{value}; add cluster.{name}={value} to the command if you trust the code there"
            )


def _targets(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Dotted keys and values of all `_target_`s."""
    match value:
        case Mapping():
            for name, item in value.items():
                path = f"{key}.{name}" if key else str(name)
                if name == "_target_" and isinstance(item, str):
                    yield path, item
                yield from _targets(item, path)
        case list():
            for number, item in enumerate(value):
                yield from _targets(item, f"{key}[{number}]")


def _locations(module: str) -> list[str]:
    """Files or folders of a top-level module, which is not imported; none if it is not found."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    return [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else [])]


def _is_standard(path: str) -> bool:
    """Whether a location is in the standard library; a user's own test.py is not."""
    return path in ("built-in", "frozen") or _is_inside(path, Path(get_path("stdlib")))


def _is_inside(path: str, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder.resolve())
