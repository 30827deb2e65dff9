"""Code shared by commands that take a run directory, a model file or an experiment."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.artifact import ArtifactError
from trainer.errors import ConfigError, RunError, one_line
from trainer.report.output import silence
from trainer.report.table import Table, rich_table

DONE, FAILED, WRONG = 0, 1, 2  # exit codes

_WIDE = 1000  # columns if the output is not a terminal


def subject_parser(
    command: str, description: str, threads: str, json_help: str
) -> argparse.ArgumentParser:
    """A parser of the arguments that all of these commands have.

    Args:
        command: Its name after `python -m`.
        description: One sentence.
        threads: Help of `--threads`.
        json_help: Help of `--json`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=description)
    parser.add_argument("what", metavar="RUN_DIR|FILE|EXPERIMENT")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changed settings of the experiment; after a FILE, the experiment's name comes first",
    )
    parser.add_argument("--batch", type=int, default=1, help="samples computed together")
    parser.add_argument("--threads", type=int, default=1, help=threads)
    parser.add_argument("--json", metavar="OUT", help=json_help)
    parser.add_argument("--config-dir", metavar="DIR", help="folder with your configuration files")
    return parser


def positive(name: str, value: float) -> float:
    """The value of a positive argument. Raises ConfigError if it is not, or not finite."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}={value:g}: it must be above 0 and finite")
    return value


def exit_code(what: str, action: Callable[[], None]) -> int:
    """Execute the command; report an error in one line.

    Args:
        what: The command's first argument, for messages.
        action: Executes the command.
    """
    try:
        action()
    except ConfigError as error:
        print(f"wrong arguments: {one_line(str(error))}", file=sys.stderr)
        return WRONG
    except ArtifactError as error:
        print(f"{what}: {error}", file=sys.stderr)
        return FAILED
    except RunError as error:
        print(f"failed: {one_line(str(error))}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"{error.filename or what}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    return DONE


def show(tables: Sequence[Table], figures: Mapping[str, Any], out: str | None) -> None:
    """Print tables to standard output; does nothing if its reader is gone.

    Args:
        tables: Not printed if `out` is "-".
        figures: Content of the JSON.
        out: A file for JSON; "-": print it; None: no JSON.
    """
    if out == "-":
        _print(json.dumps(figures, indent=2))
        return
    if out is not None:
        Path(out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDE
    with console.capture() as capture:
        for table in tables:
            console.print(rich_table(table, console.width))
    _print(capture.get().strip("\n"))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        silence(sys.stdout)
