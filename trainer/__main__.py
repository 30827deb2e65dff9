"""The command: compose a configuration, run it, and report how it ended.

    python -m trainer                                   list the experiments
    python -m trainer +experiment=NAME [key=value ...]  run one, or a sweep
    python -m trainer resume=RUN_DIR                    resume a run or a sweep

Exit codes: 0 done, 1 failed, 2 wrong configuration (nothing was started), 3 done but a limit was
missed, 130 and 143 interrupted.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import Config, to_dataclass
from trainer.config.compose import Composed, compose_config, conf_dir, one_line
from trainer.config.instantiate import OBJECT
from trainer.config.renamed import rename_keys
from trainer.driver import drive, resume
from trainer.errors import ConfigError, Interrupted, LimitsMissed, RunError
from trainer.report.output import silence
from trainer.signals import Signals
from trainer.store.directory import RunDirectory

DONE, FAILED, WRONG_CONFIG, LIMITS = 0, 1, 2, 3
# Sections that may change when a run is resumed.
RESUMABLE = ("cluster.", "checkpoint.", "limits.")


def main(arguments: Sequence[str]) -> int:
    """Execute the command line and return the exit code."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        if not options.overrides and not options.cfg:
            _print(_list_experiments(options.config_dir))
            return WRONG_CONFIG
        folder = _folder_to_resume(options.overrides)
        if folder is not None:
            composed = Composed(_resumed(folder, options.overrides[1:]), folder)
        else:
            composed = compose_config(options.overrides, options.config_dir)
        plain = composed.plain()
        config = to_dataclass(Config, plain)
        if options.cfg:
            _print(OmegaConf.to_yaml(OmegaConf.create(plain)).rstrip("\n"))
            return DONE
        signals = Signals()
        signals.install()
        if config.sweep.params:
            _sweep(config, composed, list(arguments), signals)
        elif folder is not None:
            resume(config, partial(_build, config), folder, signals)
        else:
            command = shlex.join(["python", "-m", "trainer", *arguments])
            drive(config, partial(_build, config), composed.folder, signals, command=command)
    except ConfigError as error:
        _print(f"wrong configuration: {one_line(error)}", sys.stderr)
        return WRONG_CONFIG
    except RunError as error:
        _print(f"failed: {one_line(error)}", sys.stderr)
        return FAILED
    except LimitsMissed as error:
        _print(f"limits missed: {error}", sys.stderr)
        return LIMITS
    except Interrupted as error:
        _print(str(error), sys.stderr)
        return error.exit_code
    return DONE


def _build(config: Config) -> Any:
    """The experiment; imported when it is needed, since that imports torch."""
    from trainer.experiment import Experiment

    return Experiment.from_config(config)


def _sweep(config: Config, composed: Composed, arguments: list[str], signals: Signals) -> None:
    """Search, and then run the best trial in full if `sweep.refit` is set."""
    from trainer.sweeps.driver import run_sweep  # imports Optuna

    best = run_sweep(config, composed.tree, composed.folder, arguments, signals)
    if best is not None:
        try:
            _refit(best, composed.folder / "best", signals)
        except ConfigError as error:  # after a whole search it is no longer exit code 2
            raise RunError(f"the best trial cannot be run in full: {error}") from error


def _refit(best: dict[str, Any], folder: Path, signals: Signals) -> None:
    """Run the best trial in `folder`, or resume it there; the run of another trial is moved."""
    config = to_dataclass(Config, best)
    if (folder / "config.yaml").exists():
        if _identity(RunDirectory(folder).read_config()) == _identity(dataclasses.asdict(config)):
            resume(config, partial(_build, config), folder, signals)
            return
        number = 1
        while (other := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        folder.rename(other)
        _print(f"the best trial has changed; the run of the previous one is now in {other}")
    elif folder.exists():
        RunDirectory(folder).discard()  # a driver was killed before the run began
    drive(config, partial(_build, config), folder, signals)


def _identity(plain: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a run this run: all but those that may change on resume."""
    free = tuple(prefix.rstrip(".") for prefix in RESUMABLE)
    return {
        section: value
        for section, value in rename_keys(plain).items()
        if section not in (*free, "sweep", "logger")
    }


def _print(text: str, stream: TextIO | None = None) -> None:
    """Print to a stream, by default standard output, whose reader may have gone."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        silence(stream)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Train a network and make it small. Without arguments: list the experiments.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Hydra overrides: +experiment=NAME picks an experiment, key=value changes a setting",
    )
    parser.add_argument("--config-dir", metavar="DIR", help="folder with your configuration files")
    parser.add_argument("--cfg", action="store_true", help="print the configuration; run nothing")
    return parser


def _folder_to_resume(arguments: list[str]) -> Path | None:
    """The folder of resume=RUN_DIR, whose argument is moved to the front; None if there is none."""
    for number, argument in enumerate(arguments):
        if argument.startswith("resume="):
            arguments.insert(0, arguments.pop(number))
            return Path(argument.removeprefix("resume="))
    return None


def _resumed(folder: Path, overrides: list[str]) -> DictConfig:
    """The configuration of the run in `folder`, with the overrides applied.

    Raises:
        ConfigError: There is no run, it must be resumed from Python, or an override is not allowed.
    """
    plain = rename_keys(RunDirectory(folder).read_config())
    if any(OBJECT in part for part in _parts(plain)):
        raise ConfigError(
            f"resume={folder}: the run was started from Python with objects that a configuration "
            f"cannot hold; resume it there: trainer.resume({str(folder)!r})"
        )
    for override in overrides:
        if not override.startswith(RESUMABLE):
            allowed = ", ".join(f"{prefix}*" for prefix in RESUMABLE)
            raise ConfigError(f"{override}: with resume=, only {allowed} can be changed")
    try:
        changed = OmegaConf.merge(plain, OmegaConf.from_dotlist(overrides))
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    assert isinstance(changed, DictConfig)
    return changed


def _parts(plain: dict[str, Any]) -> list[Any]:
    """The parts of a configuration that may be Python objects."""
    sections = [plain.get("phases", {}), plain.get("logger", {})]
    return [
        plain.get("model", {}),
        plain.get("data", {}),
        *(v for s in sections for v in s.values()),
    ]


def _list_experiments(config_dir: str | None) -> str:
    """A line per experiment: its name, and the first comment of its file."""
    folders = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    files = {file.stem: file for d in folders for file in (d / "experiment").glob("*.yaml")}
    width = max(map(len, files), default=0)
    lines = [f"  {name:{width}}  {_first_comment(file)}" for name, file in sorted(files.items())]
    return "\n".join(
        ["Experiments (start one with: python -m trainer +experiment=NAME [key=value ...])", *lines]
    )


def _first_comment(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line.removeprefix("# ")
    return ""


def _exit(code: int) -> NoReturn:
    """End the process without exit handlers: everything is written and closed, and handlers of
    native threads that libraries leave behind could abort the process and change the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit(main(sys.argv[1:]))
