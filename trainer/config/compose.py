"""Composes a configuration with Hydra from shipped files, files of the user, and overrides."""

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.config.explain import explain, with_cause
from trainer.config.overrides import as_hydra, drop_nested
from trainer.config.renamed import rename_keys, rename_override
from trainer.errors import ConfigError

_PRIMARY = "trainer_config"  # name of conf/config.yaml for Hydra, which no user's file has
_STATE = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)  # of a Hydra program, one object each
_TURN = threading.Lock()  # that state belongs to the process
_HYDRA_VALUE = re.compile(r"(?<!\\)\$\{hydra:([^${}]+)\}")  # not if it is escaped
_ABSENT = object()


@dataclass(frozen=True)
class Composed:
    """A composed configuration."""

    tree: DictConfig  # interpolations are not resolved
    folder: Path  # the wanted run directory
    choices: dict[str, Any] = field(default_factory=dict)  # `group` or `group@package` -> names

    def plain(self) -> dict[str, Any]:
        """The settings as plain values, interpolations resolved.

        Raises:
            ConfigError: A value is missing, or an interpolation cannot be resolved.
        """
        try:
            plain = OmegaConf.to_container(self.tree, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error, list)) from error
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}


def conf_dir() -> Path:
    """The shipped configuration: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose_config(overrides: Sequence[str], config_dir: str | None = None) -> Composed:
    """Compose a configuration.

    Args:
        overrides: Hydra overrides, such as "+experiment=smoke" and "seed=1".
        config_dir: A folder with further configuration files. Its files take precedence over
            shipped files of the same name.

    Raises:
        ConfigError: Hydra or OmegaConf refuse something.
    """
    overrides = [rename_override(override) for override in overrides]
    folders = [conf_dir()]
    if config_dir is not None:
        if not os.path.isdir(config_dir):
            raise ConfigError(f"--config-dir={config_dir}: there is no such folder")
        folders.insert(0, Path(config_dir).resolve())
    arguments = [*map(as_hydra, overrides), *_search_path(folders)]
    try:
        with _hydra(folders):
            composed = compose(_PRIMARY, arguments, return_hydra_config=True)
            HydraConfig.instance().set_config(composed)
            moved = any(override.startswith("hydra.run.dir=") for override in overrides)
            kind = "sweep" if composed.sweep.get("params") and not moved else "run"
            run_dir = Path(composed.hydra[kind].dir)
            choices = OmegaConf.to_container(composed.hydra.runtime.choices)
            OmegaConf.set_struct(composed, False)
            drop_nested(overrides, composed)
            plain = _container(composed)
            del plain["hydra"]
            plain = _with_hydra_values(plain, composed.hydra)
    except (HydraException, OmegaConfBaseException) as error:
        known_keys = partial(_known_keys, overrides, folders)
        raise ConfigError(explain(error, known_keys, folders)) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"a configuration file cannot be read: {with_cause(error)}") from error
    tree = OmegaConf.create(rename_keys(plain))
    assert isinstance(tree, DictConfig)
    _check_sweep(overrides, tree)
    assert isinstance(choices, dict)
    return Composed(tree, run_dir, {str(key): value for key, value in choices.items()})


def choose(group: str, choice: str | Sequence[str]) -> dict[str, Any]:
    """The settings that `group=choice` selects on the command line, such as cluster=inline.

    Raises:
        ConfigError: There is no such file in conf/, or it leaves settings open.
    """
    written = choice if isinstance(choice, str) else f"[{','.join(choice)}]"
    tree = compose_config([f"{group}={written}", "name=any"]).tree
    if missing := OmegaConf.missing_keys(tree[group]):
        raise ConfigError(
            f"{group}={choice!r} has no {', '.join(sorted(missing))}: pass an object or a mapping"
        )
    settings: dict[str, Any] = Composed(OmegaConf.masked_copy(tree, group), Path()).plain()[group]
    return settings


@contextmanager
def _hydra(folders: Sequence[Path]) -> Iterator[None]:
    """Let Hydra compose the shipped conf/config.yaml with groups from `folders`.

    The caller may be a Hydra program itself, whose state is put aside meanwhile. It is not copied,
    as by Singleton.get_state, since the program may hold references to it. Threads take turns.
    """
    with _TURN:
        instances = Singleton._instances
        before: dict[type, Any] = {
            kind: instances.pop(kind) for kind in _STATE if kind in instances
        }
        try:
            primary = OmegaConf.load(conf_dir() / "config.yaml")
            ConfigStore.instance().store(_PRIMARY, primary)
            with initialize_config_dir(str(folders[0]), job_name="trainer", version_base="1.3"):
                yield
        finally:
            for kind in _STATE:
                instances.pop(kind, None)
            instances.update(before)


def _search_path(folders: Sequence[Path]) -> list[str]:
    """The override that names the folders after the first one."""
    rest = json.dumps([str(folder) for folder in folders[1:]], ensure_ascii=False)
    return [f"hydra.searchpath={rest}"] if folders[1:] else []


def _known_keys(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Dotted keys of the configuration that is composed from the groups among the overrides."""
    names = {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
    parts = {override: override.lstrip("+").partition("=") for override in overrides}
    groups = [
        override
        for override, (key, _, value) in parts.items()
        if key.split("@")[0] in names and not value.startswith("{")  # settings, not a choice
    ]
    try:
        with _hydra(folders):
            composed = compose(_PRIMARY, [*groups, *_search_path(folders)])
    except (HydraException, OmegaConfBaseException):
        return []
    return list(_dotted_keys(_container(composed), ""))


def _dotted_keys(plain: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _container(tree: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _with_hydra_values(value: Any, own: DictConfig) -> Any:
    """Plain values in which `${hydra:KEY}` is replaced by Hydra's value of this composition.

    Afterwards these interpolations would find the values of the calling program, or none.

    Raises:
        ConfigError: This composition has no such value, such as `job.num` of a multirun.
    """
    if isinstance(value, Mapping):
        return {key: _with_hydra_values(item, own) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_hydra_values(item, own) for item in value]
    if not isinstance(value, str):
        return value
    if whole := _HYDRA_VALUE.fullmatch(value):
        found = OmegaConf.select(own, whole[1], default=_ABSENT)
        if found is _ABSENT:
            raise ConfigError(f"{value}: Hydra has no such value here")
        return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    return _HYDRA_VALUE.sub(lambda match: str(_with_hydra_values(match[0], own)), value)


def _check_sweep(overrides: Sequence[str], tree: DictConfig) -> None:
    """Refuse settings of a sweep on the command line if there is nothing to search."""
    mine = [override for override in overrides if override.lstrip("+").startswith("sweep.")]
    if mine and not tree.sweep.get("params") and "~sweep.params" not in overrides:
        raise ConfigError(
            f"{mine[0]}: sweep.params is empty, so there is nothing to search; give a range, such "
            "as 'sweep.params.optimizer.lr=tag(log, interval(1e-3,1e-1))', or leave sweep out"
        )
