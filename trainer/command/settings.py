"""Experiments, configuration groups and their choices, and the meaning of each setting."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.config.comments import file_comment, key_comments
from trainer.config.compose import compose_config, conf_dir

_GLOBAL = "# @package _global_"


@dataclass(frozen=True)
class Setting:
    """One key of an experiment."""

    key: str  # dotted, as on the command line
    value: Any
    comment: str  # its documentation; empty if the configuration files say nothing


def folders(config_dir: str | None) -> list[Path]:
    """Folders with configuration files; the first one takes precedence."""
    return [*([Path(config_dir)] if config_dir else []), conf_dir()]


def choices(config_dir: str | None = None) -> dict[str, dict[str, Path]]:
    """The configuration groups: name of the group -> name of the choice -> its file."""
    found: dict[str, dict[str, Path]] = {}
    for folder in reversed(folders(config_dir)):
        for file in sorted(folder.glob("*/*.yaml")):
            found.setdefault(file.parent.name, {})[file.stem] = file
    return found


def experiments(config_dir: str | None = None) -> str:
    """A line per experiment: its name, and the first comment of its file."""
    files = choices(config_dir).get("experiment", {})
    width = max(map(len, files), default=0)
    lines = [f"  {name:{width}}  {file_comment(file)}" for name, file in sorted(files.items())]
    return "\n".join(
        ["Experiments (start one with: python -m trainer +experiment=NAME [key=value ...])", *lines]
    )


def groups(config_dir: str | None = None) -> str:
    """A line per configuration group with the names that it can be set to."""
    found = {group: files for group, files in choices(config_dir).items() if group != "experiment"}
    width = max(map(len, found))
    lines = [f"  {group:{width}}  {', '.join(sorted(files))}" for group, files in found.items()]
    return "\n".join(["Groups (choose with GROUP=NAME, such as model=resnet18):", *lines])


def settings(overrides: list[str], config_dir: str | None = None) -> list[Setting]:
    """All keys of an experiment with their values and documentation.

    Args:
        overrides: As for `trainer.config.compose.compose_config`.
        config_dir: Folder with further configuration files.

    Raises:
        ConfigError: The configuration cannot be composed.
    """
    composed = compose_config(overrides, config_dir)
    comments = key_comments(conf_dir() / "config.yaml")
    files = _files(composed.choices, choices(config_dir))
    for package, file in sorted(files, key=lambda found: not found[0]):  # experiments are last
        prefix = f"{package}." if package else ""
        comments |= {prefix + key: text for key, text in _group_comments(file).items()}
    return [
        Setting(key, value, comments.get(key, "")) for key, value in _leaves(composed.plain(), "")
    ]


def describe(found: list[Setting], width: int) -> str:
    """Settings as text: each key with its value, and below it its documentation.

    Args:
        found: The settings.
        width: Columns to which the text is wrapped.
    """
    blocks: list[str] = []
    section = None
    for setting in found:
        first = setting.key.partition(".")[0]
        if first != section:
            blocks.append("")
            section = first
        blocks.append(f"{setting.key}={_as_text(setting.value)}")
        blocks += textwrap.wrap(
            setting.comment, width, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(blocks[1:])


def _files(
    chosen: Mapping[str, Any], known: Mapping[str, Mapping[str, Path]]
) -> Iterator[tuple[str, Path]]:
    """The files of an experiment: (package, file), such as (phases.prune, prune.yaml).

    Args:
        chosen: Hydra's choices: `group` or `group@package` -> name or names.
        known: As `choices` returns them.
    """
    for key, names in chosen.items():
        group, _, package = key.partition("@")
        for name in names if isinstance(names, list) else [names]:
            file = known.get(group, {}).get(str(name))
            if file is not None:
                is_global = _GLOBAL in file.read_text(encoding="utf-8")
                yield "" if is_global else package or group, file


def _group_comments(file: Path) -> dict[str, str]:
    """The comments of a group's file, and of the files of its group that it is based on."""
    comments: dict[str, str] = {}
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    for base in content.get("defaults", []):
        if isinstance(base, str) and base != "_self_":
            comments |= _group_comments(file.with_name(f"{base}.yaml"))
    return comments | key_comments(file)


def _leaves(plain: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_text(value: Any) -> str:
    """A value in the notation of the command line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
