"""One run as its driver sees it: start the workers, keep what they report, end with a summary.

The driver owns the disk: workers send messages and bytes, and write nothing. Ray takes seconds to
start; torch, the user's classes and the checks that need them are imported meanwhile. A worker that
is lost costs the steps since the last checkpoint; whether to start again is decided by
trainer.cluster.restart.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from trainer.cluster import (
    InsufficientResources,
    WorkerFailed,
    WorkerFunction,
    WorkerGroup,
    WorkerLoss,
    open_group,
    why_not_restart,
)
from trainer.config import Config
from trainer.driver.finish import judged, leave_page, show
from trainer.errors import ConfigError, Interrupted, RunError, first_line
from trainer.messages import (
    Checkpoint,
    Converted,
    EpochEnded,
    Message,
    PhaseEnded,
    RunStopped,
)
from trainer.report.summary import Summary
from trainer.report.terminal import Console
from trainer.signals import Signals
from trainer.store.checkpoints import Checkpoints, Point
from trainer.store.directory import RunDirectory, as_json


def drive(cfg: Config, plain: Mapping[str, Any], wanted: Path, signals: Signals) -> None:
    """Run `cfg` from start to end and leave its results in a run directory.

    Args:
        cfg: the typed configuration.
        plain: the same as plain values, for config.yaml.
        wanted: the run directory; a name already taken gets a suffix.
        signals: the first one saves and ends the run, the second one ends it at once.

    Raises:
        ConfigError: found before any phase began; no directory is left behind.
        RunError: the run failed; its directory holds the summary and the log.
        Interrupted: likewise, and the run can be resumed.
    """
    directory = RunDirectory.claim(wanted)
    try:
        with _told(directory):
            directory.write_config(plain)
    except RunError:
        directory.discard()
        raise
    try:
        _drive(cfg, directory, signals)
    except ConfigError:
        directory.discard()
        raise


def resume(cfg: Config, folder: Path, signals: Signals) -> None:
    """Go on with the run in `folder` where it stopped; a finished one shows its summary again.

    A finished one is held against the limits of `cfg`, which may be others than before.

    Raises as `drive`; the folder stays in any case.
    """
    directory = RunDirectory(folder.absolute())
    summary = directory.read_summary()
    if summary and summary["status"] in ("done", "limits"):
        from trainer.checks import check_limits  # slow to import

        check_limits(cfg)
        with _told(directory), Console() as console, directory.locked(console.say):
            now = judged(summary, cfg)
            if now != summary:
                directory.write_summary(now)
            if now != summary or not directory.has_report():
                leave_page(now, cfg, directory, console)
            show(now, directory, console)
    else:
        _drive(cfg, directory, signals)


def _drive(cfg: Config, directory: RunDirectory, signals: Signals) -> None:
    with _told(directory), Console() as console, directory.locked(console.say):
        summary = _Run(cfg, directory, console, signals).execute()
        leave_page(summary, cfg, directory, console)
        show(summary, directory, console)


@contextlib.contextmanager
def _told(directory: RunDirectory) -> Iterator[None]:
    """A disk that is full, a folder that is gone: one line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{directory.path}: it cannot be written to: {error}") from error


class _Run:
    """Where the messages of one run go: terminal, log, metrics, curves, summary, checkpoints."""

    def __init__(
        self, cfg: Config, directory: RunDirectory, console: Console, signals: Signals
    ) -> None:
        self.cfg = cfg
        self.directory = directory
        self.console = console
        self.signals = signals
        self.names = list(cfg.phases)
        self.summary = Summary(cfg.name, cfg.seed, cfg.precision, directory.read_summary() or {})
        self.checkpoints = Checkpoints(directory.path, cfg.checkpoint.keep)
        self.started = False  # from the first message on, a directory is never discarded

    def execute(self) -> dict[str, Any]:
        """Start the workers, run, stop them. Returns the summary, which is also on disk."""
        group: WorkerGroup | None = None
        try:
            with self.signals.holding(self._last_words):
                group = open_group(self.cfg.cluster)
            self._start(group)
            self._work(group)
            summary = judged(self.summary.as_dict("done"), self.cfg)
            self.directory.write_summary(summary)
            return summary
        except Interrupted as error:
            self._end("interrupted", str(error))
            raise
        except Exception as error:
            if self.signals.raised:
                self._end("interrupted", str(self.signals.interrupted()))
                raise self.signals.interrupted() from error
            if isinstance(error, ConfigError) and not self.started:
                raise
            self.directory.log(getattr(error, "detail", "") or traceback.format_exc())
            self._end("failed", first_line(error))
            raise RunError(
                f"{first_line(error)} (more in {self.directory.path}/log.txt)"
            ) from error
        finally:
            with self.signals.holding(self.console.restore):
                self.checkpoints.close()
                if group:
                    group.stop()

    def _start(self, group: WorkerGroup) -> None:
        """Start the workers, and import and check what takes its time meanwhile."""
        with (
            self.signals.holding(self._last_words, group.stop_requested.set),
            ThreadPoolExecutor(1) as background,
        ):
            ready = background.submit(_imports_and_checks, self.cfg, self.checkpoints, self._say)
            try:
                group.start()
            except RunError:
                ready.result()  # a wrong configuration would explain more
                raise
            ready.result()

    def _work(self, group: WorkerGroup) -> None:
        from trainer.report.tensorboard import Curves

        self.curves = Curves(self.directory.path / "tensorboard")
        losses: list[WorkerLoss] = []
        try:
            with self.signals.asking(group.stop_requested.set):
                while True:
                    try:
                        self._train(group)
                        self._measure(group)
                        return
                    except WorkerFailed as lost:
                        self._start_again(group, lost, lost.loss, losses)
        finally:
            self.curves.close()

    def _train(self, group: WorkerGroup) -> None:
        """Run the phases, from the last checkpoint on."""
        from trainer.worker.run import experiment, start_at

        self.summary.nodes = group.nodes
        point = self._rewind()
        if self.cfg.export.onnx and not (point.phase or point.step):
            from trainer.worker.export import try_export

            self._follow(group, try_export)
        start = start_at(self.cfg, point, partial(self.checkpoints.ended, self.names))
        self._follow(group, experiment, start)
        self.checkpoints.wait()

    def _measure(self, group: WorkerGroup) -> None:
        """Make the artefact, and measure on the test set what each stage left and what it holds."""
        from trainer.driver.result import Result
        from trainer.worker.evaluate import measure

        last, ended = self.summary.phases[-1], partial(self.checkpoints.ended, self.names)
        self.directory.write_model(ended(len(self.names) - 1))  # first: to encode it takes longer
        result = Result(self.cfg, ended, last)
        if result.artifact:
            self.directory.write_artifact(result.artifact)
            result.artifact = self.directory.read_artifact()  # what is measured is what is there
        self._follow(group, measure, result.models())
        self.summary.result = result.facts(self.summary.tested)
        if self.cfg.export.onnx:
            from trainer.worker.export import convert

            self._follow(group, convert, result.final, result.dense)

    def _follow(self, group: WorkerGroup, body: WorkerFunction, *args: Any) -> None:
        """Take in all messages of one body."""
        for message in group.run(body, self.cfg, *args):
            self._on(message)
            if isinstance(message, RunStopped):
                self.checkpoints.wait()
                raise self.signals.interrupted()

    def _start_again(
        self, group: WorkerGroup, lost: RunError, loss: WorkerLoss, losses: list[WorkerLoss]
    ) -> None:
        """Start the workers again, or raise `lost`; Interrupted where that was asked for before."""
        if self.signals.received is not None:
            self.checkpoints.wait()
            raise self.signals.interrupted() from lost
        losses.append(loss)
        reason = why_not_restart(losses, self.cfg.cluster.max_restarts)
        if reason is not None:
            self._say(f"not starting again: {reason}")
            raise lost
        self.summary.restarts += 1
        self.directory.log(lost.detail)
        self._say(f"{lost}; starting again from the last checkpoint (restart {len(losses)})")
        try:
            group.restart()
        except InsufficientResources:  # it has waited for some
            raise
        except RunError as error:  # another one was lost meanwhile
            self._start_again(group, error, WorkerLoss(str(error), None), losses)

    def _rewind(self) -> Point:
        """Find the last checkpoint, and forget all that was reported after it."""
        self.checkpoints.wait()
        point = self.checkpoints.latest(self.names, self._say)
        done = {name: index for index, name in enumerate(self.names)}

        def before(entry: Mapping[str, Any]) -> bool:
            return (done[entry["phase"]], entry["step"]) <= (point.phase, point.step)

        self.directory.cut_metrics(before)
        self.summary.restore(point.records, point.so_far)
        self.curves.go_on(sum(record["steps"] for record in point.records), point.step)
        if point.phase or point.step:
            self._say(f"going on {self._where(point)}")
        return point

    def _where(self, point: Point) -> str:
        if point.phase == len(self.names):
            return "after the last phase"
        name = self.names[point.phase]
        return f"after step {point.step:,} of {name}" if point.step else f"with {name}"

    def _on(self, message: Message) -> None:
        self.started = True
        self.summary.on(message)
        self.curves.on(message)
        if line := self.console.on(message):
            self.directory.log(line)
        match message:
            case EpochEnded():
                self.directory.append_metrics(as_json(message))
            case Checkpoint():
                name = self.names[message.phase]
                self.checkpoints.within_phase(
                    message.phase, name, message.step, message.content, self.summary.so_far()
                )
            case Converted() if message.content:
                self.directory.write_onnx(message.content)
            case PhaseEnded():
                record = as_json(message.record)
                self.checkpoints.phase_ended(
                    message.index, record, message.weights, self.summary.so_far()
                )

    def _say(self, line: str) -> None:
        self.console.say(line)
        self.directory.log(line)

    def _last_words(self) -> None:
        """A second signal ends the process now. What it started ends by itself (its reaper)."""
        self.console.restore()
        self._end("interrupted", str(self.signals.interrupted()))

    def _end(self, status: str, error: str) -> None:
        self.directory.write_summary(self.summary.as_dict(status, error))


def _imports_and_checks(cfg: Config, checkpoints: Checkpoints, say: Callable[[str], None]) -> None:
    """The heavy imports, and every check that can be made before workers exist."""
    from trainer.checks import check
    from trainer.store.initial import initial_weights

    model = check(cfg)
    if cfg.init_from and not checkpoints.initial(say):
        checkpoints.keep_initial(initial_weights(Path(cfg.init_from), model))
