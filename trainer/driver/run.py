"""The driver of a run: start the workers, store their reports, and write the summary.

Only the driver writes to disk: workers send messages and bytes. Ray takes seconds to start; torch
and the user's code are imported, and the experiment is built, in the meantime. After the loss of a
worker the run restarts from the last checkpoint; trainer.cluster.restart decides whether it does.
"""

import contextlib
import dataclasses
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from trainer.cluster import (
    ClusterLost,
    InsufficientResources,
    WorkerFailed,
    WorkerFunction,
    WorkerGroup,
    WorkerLoss,
    open_group,
    why_not_restart,
)
from trainer.config import Config
from trainer.driver.limits import apply_limits
from trainer.driver.members import Members, Position
from trainer.driver.recorder import Recorder
from trainer.errors import ConfigError, Interrupted, LimitsMissed, RunError, first_line
from trainer.messages import (
    STEP_COMPLETE,
    Resumed,
    RunEnded,
    RunStarted,
    RunStopped,
    Status,
    WorkersLost,
    WorkersStarted,
)
from trainer.report.cost import with_costs
from trainer.report.tables import tables
from trainer.report.terminal import Console
from trainer.report.text import plural
from trainer.signals import Signals
from trainer.store.checkpoints import ResumePoint
from trainer.store.directory import RunDirectory

_INLINE = threading.RLock()
"""Held by an inline run: others of the process wait, since torch's random generators and number of
threads are those of the whole process."""

Build = Callable[[], Any]
"""Returns the `Experiment` of the run. It is called while Ray starts, as it imports torch."""


def drive(
    config: Config,
    build: Build,
    wanted: Path,
    signals: Signals,
    *,
    command: str | None = None,
    group: WorkerGroup | None = None,
    console: Console | None = None,
    objects: bytes | None = None,
) -> RunDirectory:
    """Run an experiment from start to end and leave its results in a run directory.

    Args:
        config: The experiment's settings.
        build: Builds the experiment.
        wanted: The run directory; if it exists, a number is appended.
        signals: The first signal saves and ends the run, the second one ends it immediately.
        command: The command line, for the summary; None: the run is started from Python.
        group: Warm workers to use, which keep running; None: start workers for this run.
        console: Where progress is shown; None: the terminal.
        objects: Content of objects.pkl, the Python objects that the settings refer to.

    Returns:
        The run directory.

    Raises:
        ConfigError: Found before any phase began; no directory is left.
        RunError: The run failed; its directory holds the summary and the log.
        LimitsMissed: The run is complete, but its result misses a limit.
        Interrupted: The run was interrupted, and can be resumed.
    """
    directory = RunDirectory.claim(wanted)
    try:
        with _disk_errors(directory):
            directory.write_config(dataclasses.asdict(config))
            if objects is not None:
                directory.write_objects(objects)
    except RunError:
        directory.discard()
        raise
    try:
        _drive(config, build, directory, signals, command, group, console)
    except ConfigError:
        directory.discard()
        raise
    return directory


def resume(
    config: Config,
    build: Build,
    folder: Path,
    signals: Signals,
    *,
    group: WorkerGroup | None = None,
    console: Console | None = None,
) -> RunDirectory:
    """Resume the run in `folder` where it stopped. A finished run shows its summary again.

    The limits and prices of `config`, which may have changed, are applied to the result of a
    finished run.

    Raises as `drive`; the folder is never deleted.
    """
    directory = RunDirectory(folder.absolute())
    summary = directory.read_summary()
    if not summary or summary["status"] not in ("done", "limits"):
        _drive(config, build, directory, signals, None, group, console)
        return directory
    experiment = build()
    with _disk_errors(directory), console or Console() as shown, directory.locked(shown.say):
        now = with_costs(apply_limits(summary, config.limits), config.cost)
        if now != summary:
            directory.write_summary(now)
        if now != summary or not directory.has_report():
            from trainer.driver.report import write_report  # slow to import

            write_report(now, experiment, directory, shown.say)
        _show(now, directory, shown)
    return directory


def _drive(
    config: Config,
    build: Build,
    directory: RunDirectory,
    signals: Signals,
    command: str | None,
    group: WorkerGroup | None,
    console: Console | None,
) -> None:
    inline = config.cluster.backend == "inline"
    with (
        _disk_errors(directory),
        console or Console() as shown,
        directory.locked(shown.say),
        _INLINE if inline else contextlib.nullcontext(),
    ):
        run = _Run(config, build, directory, shown, signals, command, group)
        try:
            summary = run.execute()
        except OSError:  # the log cannot be written to, either
            if directory.has_config():
                shown.say(f"when it can be written to, resume with: {run.record.resume_command}")
            raise
        _show(summary, directory, shown)


def _show(summary: dict[str, Any], directory: RunDirectory, console: Console) -> None:
    """Show a finished run. Raises LimitsMissed."""
    for table in tables(summary):
        console.show(table)
    console.say(f"results in {directory.path}")
    if summary["status"] == "limits":
        raise LimitsMissed(summary["error"], directory.path)


@contextlib.contextmanager
def _disk_errors(directory: RunDirectory) -> Iterator[None]:
    """Report a full disk or a deleted folder in one line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{directory.path}: it cannot be written to: {error}") from error


class _Run:
    """One run from the first worker to the last file."""

    def __init__(
        self,
        config: Config,
        build: Build,
        directory: RunDirectory,
        console: Console,
        signals: Signals,
        command: str | None,
        group: WorkerGroup | None,
    ) -> None:
        self.config = config
        self.build = build
        self.directory = directory
        self.console = console
        self.signals = signals
        self.borrowed = group
        self.is_inline = config.cluster.backend == "inline"  # this process is the worker
        self.names = list(config.phases)
        self.record = Recorder(config, directory, console, command)
        self.checkpoints, self.summary = self.record.checkpoints, self.record.summary
        self.members = Members(config.cluster)
        self.experiment: Any = None  # an Experiment, once it is built
        self.noticed = 0  # notices of the group that have been shown
        self.started = False  # once a worker has sent a message, the directory is kept

    def execute(self) -> dict[str, Any]:
        """Start the workers, run, stop them. Returns the summary, which is also on disk."""
        group: WorkerGroup | None = self.borrowed
        try:
            self.record.notify(f"run directory: {self.directory.path}")
            if group is None:
                with self.signals.deferring(self._before_exit):
                    group = open_group(self.config.cluster)
            self.record.on(Status(self._starting(group)))
            self._start(group)
            self._work(group)
            summary = apply_limits(self.summary.as_dict("done"), self.config.limits)
            self.directory.write_summary(summary)
            self.record.on(Status("writing report.html"))
            self._write_report(summary)
            self.record.on(RunEnded(summary))
            return summary
        except Interrupted as error:
            self.record.end("interrupted", str(error))
            raise
        except Exception as error:
            if self.signals.raised:
                self.record.end("interrupted", str(self.signals.interrupted()))
                raise self.signals.interrupted() from error
            if isinstance(error, ConfigError) and not self.started:
                raise
            self.directory.log(getattr(error, "detail", "") or traceback.format_exc())
            self.record.end("failed", first_line(error))
            if isinstance(error, ClusterLost | InsufficientResources):
                self.record.notify_resume()
            raise RunError(
                f"{first_line(error)} (more in {self.directory.path}/log.txt)"
            ) from error
        finally:
            with self.signals.deferring(self.console.restore):
                self.record.close()
                if group and group is not self.borrowed:
                    self.console.status(None if self.is_inline else "stopping the workers")
                    group.stop()
                    self.console.status(None)

    def _start(self, group: WorkerGroup) -> None:
        """Start the workers; meanwhile build the experiment, check it, and open the sinks."""
        with (
            self.signals.deferring(self._before_exit, group.stop_requested.set),
            ThreadPoolExecutor(1) as background,
        ):
            ready = background.submit(self._prepare)
            if self.is_inline:  # it starts at once, so it can wait for the checks
                ready.result()
            try:
                if group is not self.borrowed:
                    group.start()
            except RunError:
                ready.result()  # if the configuration is wrong, raise that error instead
                raise
            ready.result()
        self._workers_started(group)

    def _workers_started(self, group: WorkerGroup) -> None:
        """Report where the workers are, and what the group has to say about it, once."""
        self.record.on(WorkersStarted(group.nodes))
        if group is not self.borrowed:
            for line in group.notices[self.noticed :]:
                self.record.notify(line)
            self.noticed = len(group.notices)

    def _prepare(self) -> None:
        """Build and check the experiment, and open the sinks, before there are workers."""
        from trainer.experiment import check_model, initial_weights  # imports torch

        self.experiment = self.build()
        model = check_model(self.experiment)
        if self.experiment.has_initial_weights and not self.checkpoints.load_initial(
            self.record.notify
        ):
            self.checkpoints.save_initial(
                initial_weights(self.experiment, model, self.record.notify)
            )
        self.record.open_loggers(self.experiment)

    def _work(self, group: WorkerGroup) -> None:
        losses: list[WorkerLoss] = []
        with self.signals.requesting(partial(self._request_stop, group)):
            while True:
                try:
                    self._train(group)
                    self._evaluate(group)
                    return
                except WorkerFailed as lost:
                    if self.members.is_replay:
                        raise
                    self._restart(group, lost, lost.loss, losses)

    def _train(self, group: WorkerGroup) -> None:
        """Run the phases, from the last checkpoint or from a state that the workers keep."""
        from trainer.worker.export import try_export
        from trainer.worker.run import run_phases, start_at

        saved = partial(self.checkpoints.weights_after, self.names)
        point, position, continues = self._rewind()
        if self.members.is_replay:
            self.members.begin(group, position)
        while True:
            if self.config.export.onnx and not (point.phase or point.step or continues):
                self.record.on(Status("trying to export the fresh model to ONNX"))
                self._follow(group, try_export)
            self.record.on(Status("building model and data on the workers"))
            start = start_at(self.experiment, point, saved)
            leave_at = self.members.leave_at(position)
            if not self._follow(group, run_phases, start, continues, leave_at, position=position):
                self.checkpoints.wait()
                return
            if leave_at is not None:
                self.members.begin(group, leave_at)
            else:
                self.members.change(group)
            self._workers_started(group)
            point, position, continues = self._rewind()

    def _evaluate(self, group: WorkerGroup) -> None:
        """Write the model files, and evaluate every stage and the compressed file."""
        from trainer.driver.result import FinalModels
        from trainer.worker.evaluate import evaluate_models
        from trainer.worker.export import export_models

        saved = partial(self.checkpoints.weights_after, self.names)
        # First, since encoding takes longer and could be interrupted.
        self.directory.write_model(saved(len(self.names) - 1))
        self.record.on(Status(self._finishing()))
        models = FinalModels(self.experiment, saved, self.summary.phases[-1])
        if models.artifact:
            self.directory.write_artifact(models.artifact)
            models.artifact = self.directory.read_artifact()  # evaluate what is on the disk
        self.record.on(Status("evaluating on the test set"))
        self._follow(group, evaluate_models, models.models())
        self.summary.result = models.facts(self.summary.evaluated)
        if self.config.export.onnx:
            self.record.on(Status("writing and measuring model.onnx"))
            self._follow(group, export_models, models.final, models.dense)

    def _starting(self, group: WorkerGroup) -> str:
        """Status at the start of the run."""
        workers = self.config.cluster.workers
        if group is self.borrowed or self.is_inline:
            return "building the experiment"
        return f"starting Ray and {workers} {plural('worker', workers)}"

    def _finishing(self) -> str:
        """Status after the last phase."""
        return "encoding model.dcz" if self.config.artifact.make else "reading the final weights"

    def _follow(
        self,
        group: WorkerGroup,
        function: WorkerFunction,
        *args: Any,
        position: Position | None = None,
    ) -> bool:
        """Run a function on the workers and take all its messages.

        Args:
            position: Where the function begins to train; None: it does not train.

        Returns:
            Whether it has stopped to continue with other members.
        """
        changes = False
        for message in group.run(function, self.experiment.for_workers(), *args):
            self.started = True
            self.record.on(message)
            if position is not None and self.record.head_lost_for_long:
                group.stop_requested.set()
            if isinstance(message, RunStarted) and self.members.is_recorded and position:
                self.record.on(self.members.started(group, position))
            if isinstance(message, RunStopped):
                if message.changes_members:
                    changes = True
                    continue
                self.checkpoints.wait()
                if self.signals.received is None and self.record.head_lost is not None:
                    raise ClusterLost(self.record.head_lost.address)
                raise self.signals.interrupted()
        return changes

    def _restart(
        self, group: WorkerGroup, lost: RunError, loss: WorkerLoss, losses: list[WorkerLoss]
    ) -> None:
        """Restart the workers, or raise `lost`; Interrupted if a signal arrived before."""
        if self.signals.received is not None:
            self.checkpoints.wait()
            raise self.signals.interrupted() from lost
        losses.append(loss)
        reason = why_not_restart(losses, self.config.cluster.max_restarts)
        if reason is not None:
            self.record.notify(f"not restarting: {reason}")
            raise lost
        counted = sum(not one.has_left for one in losses)
        elastic = self.config.cluster.min_workers is not None
        self.record.on(WorkersLost(str(lost), lost.detail, counted, elastic, not loss.has_left))
        try:
            if elastic:
                self.members.change(group, str(lost))
            else:
                group.restart()
        except InsufficientResources:  # it has waited for them
            raise
        except RunError as error:  # another worker was lost meanwhile
            self._restart(group, error, WorkerLoss(str(error), None), losses)
        self._workers_started(group)

    def _rewind(self) -> tuple[ResumePoint, Position, bool]:
        """Find where the run continues, and let the sinks discard later reports.

        Returns:
            The last checkpoint; the position at which training continues; whether that is a later
            state, which the workers keep.
        """
        self.checkpoints.wait()
        point = self.checkpoints.latest(self.names, self.record.notify)
        kept = self.members.continues_at(point)
        position = kept or (point.phase, point.step, STEP_COMPLETE)
        phase, step, stage = position
        is_evaluated = stage == STEP_COMPLETE
        self.record.on(
            Resumed(phase, step, self.names, point.records, point.progress, is_evaluated)
        )
        return point, position, kept is not None

    def _request_stop(self, group: WorkerGroup) -> None:
        """The first signal arrived."""
        group.stop_requested.set()
        self.record.notify("saving a checkpoint and stopping; press Ctrl-C again to quit at once")

    def _before_exit(self) -> None:
        """The second signal ends the process now. Ray's processes are ended by the reaper."""
        self.console.restore()
        self.record.end("interrupted", str(self.signals.interrupted()))

    def _write_report(self, summary: dict[str, Any]) -> None:
        from trainer.driver.report import write_report  # slow to import

        write_report(summary, self.experiment, self.directory, self.record.notify)
