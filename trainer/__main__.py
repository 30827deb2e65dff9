"""The command: compose a configuration, check it, run it, and say how it ended.

    python -m trainer                                   the experiments, a line each
    python -m trainer +experiment=NAME [key=value ...]
    python -m trainer resume=RUN_DIR                    go on where it stopped; sweeps too

Exit codes: 0 done, 1 failed, 2 wrong configuration (nothing was started), 3 done but a limit was
missed, 130 and 143 interrupted.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.config import Config, to_dataclass
from trainer.config.overrides import as_hydra, drop_nested
from trainer.driver import drive, resume
from trainer.errors import ConfigError, Interrupted, LimitsMissed, RunError, first_line
from trainer.report.terminal import silence
from trainer.signals import Signals
from trainer.store.directory import RunDirectory

DONE, FAILED, WRONG_CONFIG, LIMITS = 0, 1, 2, 3
# Settings that do not make a resumed run another run.
RESUMABLE = ("cluster.", "checkpoint.", "limits.")


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        if not options.overrides and not options.cfg:
            _show(_list_experiments(options.config_dir))
            return WRONG_CONFIG
        folder = _folder_to_resume(options.overrides)
        if folder is not None:
            composed, run_dir = _resumed(folder, options.overrides[1:]), folder
        else:
            composed, run_dir = _compose(options.overrides, options.config_dir)
        plain = _plain(composed)
        cfg = to_dataclass(Config, plain)
        if options.cfg:
            _show(OmegaConf.to_yaml(OmegaConf.create(plain)).rstrip("\n"))
            return DONE
        signals = Signals()
        signals.install()
        if cfg.sweep.params:
            _sweep(cfg, composed, run_dir, list(arguments), signals)
        elif folder is not None:
            resume(cfg, folder, signals)
        else:
            drive(cfg, plain, run_dir, signals)
    except ConfigError as error:
        _show(f"wrong configuration: {_told(error)}", sys.stderr)
        return WRONG_CONFIG
    except RunError as error:
        _show(f"failed: {_told(error)}", sys.stderr)
        return FAILED
    except LimitsMissed as error:
        _show(f"limits missed: {error}", sys.stderr)
        return LIMITS
    except Interrupted as error:
        _show(str(error), sys.stderr)
        return error.exit_code
    return DONE


def _sweep(
    cfg: Config, composed: DictConfig, folder: Path, arguments: list[str], signals: Signals
) -> None:
    """Search, and then train the winner in full where `sweep.refit` says so."""
    from trainer.sweep.driver import run_sweep  # Optuna is not for those who do not sweep

    winner = run_sweep(cfg, composed, folder, arguments, signals)
    if winner is not None:
        try:
            _train_winner(winner, folder / "best", signals)
        except ConfigError as error:  # by now it has cost more than a look at the configuration
            raise RunError(f"the best trial cannot be trained in full: {error}") from error


def _train_winner(winner: dict[str, Any], best: Path, signals: Signals) -> None:
    """Run `winner` in `best`, or go on there; the run of another winner is moved aside."""
    if (best / "config.yaml").exists():
        if _essence(RunDirectory(best).read_config()) == _essence(winner):
            resume(to_dataclass(Config, winner), best, signals)
            return
        number = 1
        while (aside := best.with_name(f"{best.name}-{number}")).exists():
            number += 1
        best.rename(aside)
        _show(f"the best trial is another one than before, whose run is now in {aside}")
    elif best.exists():
        RunDirectory(best).discard()  # it was killed before it began
    drive(to_dataclass(Config, winner), winner, best, signals)


def _essence(plain: dict[str, Any]) -> dict[str, Any]:
    """What makes a run this one: all but what may change when it goes on."""
    free = tuple(prefix.rstrip(".") for prefix in RESUMABLE)
    return {section: value for section, value in plain.items() if section not in free}


def _show(text: str, stream: TextIO | None = None) -> None:
    """Print to a stream, standard output by default, whose reader may have gone."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        silence(stream)


def conf_dir() -> Path:
    """The shipped configuration: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


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
    parser.add_argument("--config-dir", metavar="DIR", help="more configuration: your experiments")
    parser.add_argument("--cfg", action="store_true", help="print the configuration; run nothing")
    return parser


def _compose(overrides: list[str], config_dir: str | None) -> tuple[DictConfig, Path]:
    """Compose with Hydra. Returns the configuration, not resolved, and the wanted run directory.

    Raises:
        ConfigError: whatever Hydra or OmegaConf object to.
    """
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir={config_dir}: there is no such folder")
        folder = json.dumps(str(Path(config_dir).resolve()), ensure_ascii=False)
        overrides = [*overrides, f"hydra.searchpath=[{folder}]"]
    written = [as_hydra(override) for override in overrides]
    try:
        with initialize_config_dir(str(conf_dir()), job_name="trainer", version_base="1.3"):
            composed = compose("config", written, return_hydra_config=True)
            HydraConfig.instance().set_config(composed)
            moved = any(override.startswith("hydra.run.dir=") for override in overrides)
            kind = "sweep" if composed.sweep.get("params") and not moved else "run"
            run_dir = Path(composed.hydra[kind].dir)
            OmegaConf.set_struct(composed, False)
            del composed["hydra"]
            drop_nested(overrides, composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_told(error)) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"a configuration file cannot be read: {_told(error)}") from error
    return composed, run_dir


def _plain(composed: DictConfig) -> dict[str, Any]:
    """Plain values, interpolations resolved. Raises ConfigError."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_told(error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _told(error: Exception) -> str:
    """The message of a Hydra error and what caused it, on one line."""
    text = str(error).partition("Config search path")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if error.__cause__ and first_line(error.__cause__) not in text:
        lines.append(first_line(error.__cause__))
    return " ".join(lines)


def _folder_to_resume(arguments: list[str]) -> Path | None:
    """The folder of resume=RUN_DIR, which must come first; any path will do."""
    for number, argument in enumerate(arguments):
        if argument.startswith("resume="):
            arguments.insert(0, arguments.pop(number))
            return Path(argument.removeprefix("resume="))
    return None


def _resumed(folder: Path, overrides: list[str]) -> DictConfig:
    """The configuration of the run in `folder`, with what may be changed changed.

    Raises:
        ConfigError: there is no run, or an override would make it another one.
    """
    plain = RunDirectory(folder).read_config()
    for override in overrides:
        if not override.startswith(RESUMABLE):
            allowed = ", ".join(f"{prefix}*" for prefix in RESUMABLE)
            raise ConfigError(f"{override}: with resume=, only {allowed} can be changed")
    try:
        changed = OmegaConf.merge(plain, OmegaConf.from_dotlist(overrides))
    except OmegaConfBaseException as error:
        raise ConfigError(_told(error)) from error
    assert isinstance(changed, DictConfig)
    return changed


def _list_experiments(config_dir: str | None) -> str:
    """A line each: the name, and the first comment of its file."""
    folders = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    files = sorted(f for folder in folders for f in (folder / "experiment").glob("*.yaml"))
    width = max((len(f.stem) for f in files), default=0)
    lines = [f"  {f.stem:{width}}  {_first_comment(f)}" for f in files]
    return "\n".join(
        ["Experiments (start one with: python -m trainer +experiment=NAME [key=value ...])", *lines]
    )


def _first_comment(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line.removeprefix("# ")
    return ""


def _leave(code: int) -> NoReturn:
    """End the process. Everything is closed and written by now; the exit handlers of native threads
    that libraries leave behind could still abort it, and change the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
