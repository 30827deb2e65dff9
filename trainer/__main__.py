"""The command: composes a configuration, runs it, and returns the exit code.

    trainer                                   list the experiments
    trainer +experiment=NAME [key=value ...]  run one, or a sweep
    trainer resume=RUN_DIR                    resume a run or a sweep
    trainer [+experiment=NAME] --help         explain the settings
    trainer doctor                            examine this machine
    trainer artifact VERB FILE                see trainer.artifact
    trainer hardware FILE                     see trainer.hardware
    trainer inference FILE                    see trainer.inference
    trainer lecture                           see trainer.lecture

`python -m trainer` is the same command. Exit codes: 0 done, 1 failed, 2 wrong configuration
(nothing was started), 3 done but a limit was missed, 130 and 143 interrupted.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.command.settings import describe, experiments, groups, settings
from trainer.config import ClusterConfig, Config, to_dataclass
from trainer.config.compose import Composed, compose_config
from trainer.config.explain import explain
from trainer.config.instantiate import OBJECT
from trainer.config.renamed import rename_keys
from trainer.config.resumed import check_code
from trainer.driver import drive, resume
from trainer.errors import ConfigError, Interrupted, LimitsMissed, RunError, one_line
from trainer.imports import collector_paused
from trainer.report.output import silence
from trainer.signals import Signals
from trainer.store.directory import RunDirectory
from trainer.version import __version__

DONE, FAILED, WRONG_CONFIG, LIMITS = 0, 1, 2, 3
# Sections that may change when a run is resumed.
RESUMABLE = ("cluster.", "checkpoint.", "limits.", "cost.")


def main(arguments: Sequence[str]) -> int:
    """Execute the command line and return the exit code."""
    if arguments and arguments[0] in ("artifact", "hardware", "inference", "lecture"):
        with collector_paused():
            subcommand = import_module(f"trainer.{arguments[0]}.__main__").main
        return int(subcommand(arguments[1:]))
    if arguments[:1] == ["--complete"]:
        from trainer.command.completion import complete

        _print("\n".join(complete(list(arguments[1:]))))
        return DONE
    options = _parser().parse_intermixed_args(arguments)
    try:
        _check_folders(options.config_dir)
        if _answered(options):
            return DONE
        if options.overrides[:1] == ["doctor"]:
            return _doctor(options)
        if not options.overrides and not options.cfg:
            _print(experiments(options.config_dir))
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
        _print(f"wrong configuration: {one_line(str(error))}", sys.stderr)
        return WRONG_CONFIG
    except RunError as error:
        _print(f"failed: {one_line(str(error))}", sys.stderr)
        return FAILED
    except LimitsMissed as error:
        _print(f"limits missed: {error}", sys.stderr)
        return LIMITS
    except Interrupted as error:
        _print(str(error), sys.stderr)
        return error.exit_code
    return DONE


def _check_folders(config_dir: str | None) -> None:
    """Raise ConfigError if the working directory or the folder of configurations is missing."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the working directory no longer exists: cd to another one") from error
    if config_dir is not None and not os.path.isdir(config_dir):
        raise ConfigError(f"--config-dir={config_dir}: there is no such folder")


def _answered(options: argparse.Namespace) -> bool:
    """Answer an option that asks for information. Returns whether there was one."""
    if options.version:
        _print(f"trainer {__version__}")
    elif options.list:
        _print(experiments(options.config_dir))
    elif options.completion is not None:
        from trainer.command.completion import script

        _print(script(options.completion).rstrip("\n"))
    elif options.help and options.overrides:
        width = shutil.get_terminal_size().columns - 1
        _print(describe(settings(options.overrides, options.config_dir), width))
    elif options.help:
        _print(f"{_parser().format_help()}\n{groups(options.config_dir)}")
    else:
        return False
    return True


def _doctor(options: argparse.Namespace) -> int:
    """Examine this machine, and the cluster that the settings `cluster.*` name."""
    from trainer.command.doctor import doctor

    overrides = options.overrides[1:]
    for override in overrides:
        if not override.startswith(("cluster.", "cluster=")):
            raise ConfigError(f"doctor {override}: only settings of cluster can be given")
    plain = compose_config(["name=doctor", *overrides], options.config_dir).plain()
    cfg = to_dataclass(ClusterConfig, plain["cluster"], "cluster")
    return DONE if doctor(cfg, Path.cwd(), _print) else FAILED


def _build(config: Config) -> Any:
    """The experiment; imported when it is needed, since that imports torch."""
    with collector_paused():
        from trainer.experiment import Experiment

    return Experiment.from_config(config)


def _sweep(config: Config, composed: Composed, arguments: list[str], signals: Signals) -> None:
    """Search, and then run the best trial in full if `sweep.refit` is set."""
    with collector_paused():
        from trainer.sweeps.driver import run_sweep  # imports Optuna

    best = run_sweep(config, composed.tree, composed.folder, arguments, signals)
    if best is not None:
        try:
            _refit(best, composed.folder / "best", signals)
        except ConfigError as error:  # no exit code 2 after a whole search
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
    """The settings that identify a run: all except those that may change on resume."""
    free = tuple(prefix.rstrip(".") for prefix in RESUMABLE)
    return {
        section: value
        for section, value in rename_keys(plain).items()
        if section not in (*free, "sweep", "logger")
    }


def _print(text: str, stream: TextIO | None = None) -> None:
    """Print to a stream, by default standard output; ignores that its reader is gone."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)  # names of files may be bytes
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        silence(stream)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer",
        usage="trainer [+experiment=NAME] [key=value ...] [options]\n"
        "       trainer resume=RUN_DIR | doctor | artifact | hardware | inference | lecture",
        description="Train a network and make it small. Without arguments: list the experiments.",
        add_help=False,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="+experiment=NAME chooses an experiment, key=value changes a setting, resume=RUN_DIR "
        "resumes a run; doctor examines this machine; artifact inspects model files; hardware "
        "shows what a model costs, inference how fast it is; lecture reproduces published figures",
    )
    parser.add_argument("--config-dir", metavar="DIR", help="folder with your configuration files")
    parser.add_argument("--cfg", action="store_true", help="print the configuration; run nothing")
    parser.add_argument(
        "-h", "--help", action="store_true", help="with an experiment: explain all its settings"
    )
    parser.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument(
        "--completion", metavar="SHELL", help="print the completion script of bash, zsh or fish"
    )
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
        given = OmegaConf.from_dotlist(overrides)
        check_code(plain, folder, given.get("cluster", {}))
        changed = OmegaConf.merge(plain, given)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, list)) from error
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


def command() -> NoReturn:
    """The console script `trainer`: like `python -m trainer`, it finds code in this folder."""
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    _exit(main(sys.argv[1:]))


def _exit(code: int) -> NoReturn:
    """End the process without exit handlers: everything is written and closed, and handlers of
    native threads that libraries leave behind could abort the process and change the exit code.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the parent (>&-)
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit(main(sys.argv[1:]))
