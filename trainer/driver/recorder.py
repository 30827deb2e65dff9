"""The record of a run: every message goes to the sinks, and its content into the run directory."""

import shlex
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from trainer.cluster import ClusterLost
from trainer.config import Config
from trainer.errors import first_line
from trainer.messages import (
    Checkpoint,
    Exported,
    HeadLost,
    HeadRecovered,
    Message,
    Notice,
    PhaseEnded,
    RunEnded,
    Traced,
)
from trainer.report.sinks import LogSink, MembersSink, MetricsSink, Sink
from trainer.report.summary import SummarySink
from trainer.report.terminal import Console
from trainer.store.checkpoints import Checkpoints
from trainer.store.directory import RunDirectory, as_json


class Recorder:
    """Passes messages on to the terminal, the log, the summary and the loggers.

    Attributes:
        checkpoints: Of the run.
        summary: The sink that makes the summary.
        head_lost: The message that the head node is lost, until it recovers.
        resume_command: The command that resumes the run.
    """

    def __init__(
        self, config: Config, directory: RunDirectory, console: Console, command: str | None
    ) -> None:
        self.checkpoints = Checkpoints(directory.path, config.checkpoint.keep)
        self.summary = SummarySink(config, command, directory.read_summary())
        self.head_lost: HeadLost | None = None
        self._directory = directory
        self._names = list(config.phases)
        self._sinks: list[Sink] = [
            LogSink(directory),  # first: a line that the user has seen is in the log
            console,
            MetricsSink(directory),
            MembersSink(directory),
            self.summary,
        ]
        self._loggers: list[Sink] = []  # chosen by `logger`; a failure of theirs ends no run
        arguments = [f"resume={directory.path}"]
        if config.cluster.working_dir:  # folders of code have to be given again
            arguments.append(f"cluster.working_dir={config.cluster.working_dir}")
        if config.cluster.py_modules:
            arguments.append(f"cluster.py_modules=[{','.join(config.cluster.py_modules)}]")
        self.resume_command = shlex.join(["python", "-m", "trainer", *arguments])

    def open_loggers(self, experiment: Any) -> None:
        """Open the sinks that the experiment names. Raises as `Experiment.build_loggers`."""
        self._loggers = experiment.build_loggers(self._directory.path, experiment.name)

    @property
    def head_lost_for_long(self) -> bool:
        """Whether training must save its state and stop, before Ray ends all processes."""
        return self.head_lost is not None and time.monotonic() > self.head_lost.deadline

    def on(self, message: Message) -> None:
        """Pass a message to all sinks, and store its content."""
        for sink in self._sinks:
            sink.on(message)
        for logger in list(self._loggers):
            self._call(logger, partial(logger.on, message))
        match message:
            case Checkpoint():
                name = self._names[message.phase]
                self.checkpoints.save_within(
                    message.phase, name, message.step, message.content, self.summary.progress()
                )
            case HeadLost():  # now, since Ray may end this process without notice
                self.head_lost = message
                error = str(ClusterLost(message.address))
                self._directory.write_summary(self.summary.as_dict("failed", error))
                self.notify_resume()
            case HeadRecovered():
                self.head_lost = None
                self._directory.delete_summary()
            case Exported() if message.content:
                self._directory.write_onnx(message.content)
            case Traced():
                for rank, trace in enumerate(message.traces):
                    name = f"{message.index + 1:02}-{message.name}-rank{rank}.json.gz"
                    self._directory.write_trace(name, trace)
            case PhaseEnded():
                record = as_json(message.record)
                self.checkpoints.save_phase_end(
                    message.index, record, message.weights, self.summary.progress()
                )

    def notify(self, line: str) -> None:
        """Show and log one line."""
        self.on(Notice(line))

    def notify_resume(self) -> None:
        """Show and log the command that resumes the run."""
        self.notify(f"resume with: {self.resume_command}")

    def end(self, status: str, error: str) -> None:
        """Write the summary of a run that did not succeed, and say how to resume it."""
        summary = self.summary.as_dict(status, error)
        self._directory.write_summary(summary)
        if status == "interrupted":
            self.notify_resume()
        self.on(RunEnded(summary))

    def close(self) -> None:
        """Finish writing checkpoints, and close the loggers."""
        self.checkpoints.close()
        for logger in list(self._loggers):
            self._call(logger, logger.close)

    def _call(self, logger: Sink, call: Callable[[], None]) -> None:
        """Call a logger; if it fails, report that, and do not use it any more."""
        try:
            call()
        except Exception as error:
            self._loggers.remove(logger)
            self._directory.log(traceback.format_exc())
            self.notify(
                f"{type(logger).__name__} failed and records nothing more: "
                f"{first_line(error)} (more in log.txt)"
            )
