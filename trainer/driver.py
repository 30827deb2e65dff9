"""One run as its driver sees it: start the workers, keep what they report, end with a summary.

The driver owns the disk: workers send messages and bytes, and write nothing. Ray takes seconds to
start; torch, the user's classes and the checks that need them are imported meanwhile.
"""

import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer.cluster import Body, WorkerGroup, open_group
from trainer.config import Config
from trainer.errors import ConfigError, Interrupted, RunError
from trainer.messages import EpochEnded, Message, PhaseEnded
from trainer.report.console import Console
from trainer.report.directory import RunDirectory, as_json
from trainer.report.summary import Summary, table


def drive(cfg: Config, plain: Mapping[str, Any], wanted: Path) -> None:
    """Run `cfg` from start to end and leave its results in a run directory.

    Args:
        cfg: the typed configuration.
        plain: the same as plain values, for config.yaml.
        wanted: the run directory; a name already taken gets a suffix.

    Raises:
        ConfigError: found before any phase began; no directory is left behind.
        RunError: the run failed; its directory holds the summary and the log.
        Interrupted: likewise.
    """
    directory = RunDirectory.claim(wanted)
    try:
        directory.write_config(plain)
        with Console() as console:
            summary = _Run(cfg, directory, console).execute()
            console.terminal.print(table(summary))
            console.say(f"results in {directory.path}")
    except ConfigError:
        directory.discard()
        raise


class _Run:
    """Where the messages of one run go: terminal, log, metrics, curves, summary, checkpoints."""

    def __init__(self, cfg: Config, directory: RunDirectory, console: Console) -> None:
        self.cfg = cfg
        self.directory = directory
        self.console = console
        self.summary = Summary(cfg.name, cfg.seed, cfg.precision)

    def execute(self) -> dict[str, Any]:
        """Start the workers, run, stop them. Returns the summary, which is also on disk."""
        group = open_group(self.cfg.cluster)
        try:
            self._train(group)
        except ConfigError:
            raise
        except Interrupted as error:
            self._end("interrupted", str(error))
            raise
        except Exception as error:
            self.directory.log(getattr(error, "detail", "") or traceback.format_exc())
            self._end("failed", _first_line(error))
            if isinstance(error, RunError):
                raise
            raise RunError(f"{type(error).__name__}: {_first_line(error)}") from error
        else:
            return self._end("done")
        finally:
            group.stop()

    def _train(self, group: WorkerGroup) -> None:
        with ThreadPoolExecutor(1) as background:
            ready = background.submit(_imports_and_checks, self.cfg)
            try:
                group.start()
            except RunError:
                ready.result()  # a wrong configuration would explain more
                raise
            body, curves_type = ready.result()
        self.summary.nodes = group.nodes
        curves = curves_type(self.directory.path / "tensorboard")
        try:
            for message in group.run(body, self.cfg):
                self._on(message)
                curves.on(message)
        finally:
            curves.close()

    def _on(self, message: Message) -> None:
        self.summary.on(message)
        if line := self.console.on(message):
            self.directory.log(line)
        match message:
            case EpochEnded():
                self.directory.append_metrics(as_json(message))
            case PhaseEnded():
                name = message.record.name
                self.directory.write_checkpoint(message.index + 1, name, message.weights)
                self.directory.write_model(message.weights)

    def _end(self, status: str, error: str | None = None) -> dict[str, Any]:
        summary = self.summary.as_dict(status, error)
        self.directory.write_summary(summary)
        return summary


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _imports_and_checks(cfg: Config) -> tuple[Body, Any]:
    """The heavy imports, and every check that can be made before workers exist."""
    from trainer.checks import check
    from trainer.report.curves import Curves
    from trainer.run import experiment

    check(cfg)
    return experiment, Curves
