"""The driver of a sweep: opens its folder, workers and study, searches, and writes the results."""

import contextlib
import os
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from optuna.trial import TrialState

from trainer.config import Config
from trainer.errors import ConfigError, Interrupted, RunError, first_line
from trainer.signals import Signals
from trainer.store.directory import RunDirectory
from trainer.sweeps.budget import Budget
from trainer.sweeps.plan import Plan
from trainer.sweeps.pool import Pool
from trainer.sweeps.results import Results
from trainer.sweeps.search import Search
from trainer.sweeps.show import LiveTable, total_trials
from trainer.sweeps.study import SweepStudy, without_password

INTERRUPTED = "interrupted"  # status


def run_sweep(
    cfg: Config,
    base: DictConfig,
    folder: Path,
    arguments: list[str] | None,
    signals: Signals,
    objects: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Search `cfg.sweep.params`, or continue the sweep in `folder`.

    Args:
        cfg: The configuration.
        base: The same as composed, with unresolved interpolations.
        folder: Of the sweep; created if it is missing.
        arguments: The command line, for the commands that reproduce a trial; None: the sweep was
            started from Python.
        signals: The first signal saves and ends the sweep, the second ends it at once.
        objects: What was passed from Python, by name.
        progress: Whether to print the progress.

    Returns:
        With `sweep.refit`, the plain configuration of the best trial; else None.

    Raises:
        ConfigError: A setting is wrong; no trial has begun, and no new folder is left behind.
        RunError: No trial was completed, no workers were available, or there was another error;
            log.txt holds its traceback.
        Interrupted: By a signal; the same command continues the sweep.
    """
    plan = Plan(cfg, base, objects)
    folder = folder.resolve()
    new = not os.path.exists(folder)
    directory = RunDirectory.claim(folder) if new else RunDirectory(folder)
    try:
        if new or not directory.has_config():
            directory.write_command(arguments)
            directory.write_config(plan.unresolved())
        with ExitStack() as locks:
            return _Sweep(plan, directory, arguments, signals, locks, progress).execute()
    except ConfigError:
        if new:
            directory.discard()
        raise
    except OSError as error:
        raise RunError(f"{folder}: it cannot be written to: {error}") from error


class _Sweep:
    def __init__(
        self,
        plan: Plan,
        directory: RunDirectory,
        arguments: list[str] | None,
        signals: Signals,
        locks: ExitStack,
        progress: bool,
    ) -> None:
        self.plan, self.cfg, self.sweep = plan, plan.cfg, plan.cfg.sweep
        self.directory, self.signals, self.locks = directory, signals, locks
        self.arguments = arguments
        total = total_trials(self.sweep, plan.space)
        self.table = LiveTable(self.sweep, directory, total, quiet=not progress)
        self.pool = Pool(self.cfg, self.table.say)
        self.interrupted = False  # by the first signal
        self.saved = False  # whether the results were saved since the signal

    def execute(self) -> dict[str, Any] | None:
        """Search, and write the results. Returns as `run_sweep`."""
        self.locks.enter_context(self.directory.locked(self.table.say))
        try:
            with self.signals.deferring(self.table.restore, self._interrupt):
                try:
                    self._check_folder()
                    with ExitStack() as opened:
                        self._open(opened)
                        return self._search()
                finally:
                    self.pool.close()
        except (ConfigError, RunError):
            raise
        except Exception as error:
            raise self._logged(error) from error

    def _interrupt(self) -> None:
        """Note the first signal. A signal handler cannot safely do more."""
        self.interrupted = True

    def _open(self, opened: ExitStack) -> None:
        with ThreadPoolExecutor(1) as background:
            checked = background.submit(self.plan.check)
            try:
                self.pool.open()
            except RunError:
                checked.result()  # if the configuration is wrong, raise that error instead
                raise
            epochs = checked.result()
        self.study = SweepStudy(
            self.sweep,
            self.plan.space,
            self.cfg.name,
            self.cfg.seed,
            self.directory.path,
            epochs,
            self.plan.sampler,
            self.plan.pruner,
        )
        opened.callback(self.study.close)
        self.study.record_settings(self.plan.identity())
        self._keep_settings()
        self.results = Results(self.plan, self.study, self.directory)
        self.budget = Budget(self.sweep, self.study)

    @property
    def _resumed(self) -> bool:
        return any(argument.startswith("resume=") for argument in self.arguments or ())

    def _check_folder(self) -> None:
        """Refuse to continue without the files or the storage of the earlier sessions."""
        folder = self.directory.path
        if self._resumed and not self.directory.has_command():
            raise ConfigError(
                f"resume={folder}: command.json is missing; repeat the sweep's own command instead"
            )
        kept = self.directory.read_config().get("sweep", {}).get("storage")
        storage = self.plan.unresolved()["sweep"].get("storage")
        if kept != storage and any((folder / name).exists() for name in ("study.db", "owner")):
            raise ConfigError(
                f"sweep.storage={without_password(self.sweep.storage)}: the trials of {folder} are "
                "in another storage; choose another sweep.name, or, if the database has moved, "
                "change config.yaml there"
            )

    def _keep_settings(self) -> None:
        """Write config.yaml, from which `resume=` continues, and the command to the folder.

        If the study is not new, only settings that may change are updated. If it is new, files of
        an earlier command, which failed before it created a study, are replaced. The lock of the
        folder is on config.yaml: the new file is locked before the old lock is released.
        """
        if not self._resumed and (self.study.new or not self.directory.has_command()):
            self.directory.write_command(self.arguments)
        kept, now = self.directory.read_config(), self.plan.unresolved()
        if not self.study.new:
            now = {**kept, "sweep": {**kept["sweep"], **self.plan.free()}}
        if now != kept:
            self.directory.write_config(now)
            self.locks.enter_context(self.directory.locked(self.table.say))

    def _search(self) -> dict[str, Any] | None:
        search = Search(self.plan, self.study, self.pool, self.table, self.budget, self.directory)
        try:
            with self.table:
                search.run(self._stop_requested)
            if self.interrupted:
                raise self.signals.interrupted()
            if not self.study.trials(TrialState.COMPLETE):
                raise RunError(f"no trial was completed (more in {self.directory.path}/log.txt)")
        except ConfigError:  # no trial has begun
            self.study.delete()
            raise
        except Interrupted as error:
            self._finish(search, INTERRUPTED, str(error))
            raise
        except RunError as error:
            self._finish(search, "failed", first_line(error))
            raise
        except Exception as error:
            failure = self._logged(error)
            self._finish(search, "failed", str(failure))
            raise failure from error
        if failed := self._finish(search, "done", None):
            raise failed
        if not self.sweep.refit or self.study.leader is None:
            return None
        return self.plan.winner(self.study.leader.params)

    def _stop_requested(self) -> bool:
        """Whether to stop. Saves the results at once, since a second signal would leave no time."""
        if self.interrupted and not self.saved:
            self.saved = True
            self.budget.keep()
            error = str(self.signals.interrupted())
            self.results.write(INTERRUPTED, error, self.budget.seconds(), report=False)
        return self.interrupted

    def _finish(self, search: Search, status: str, error: str | None) -> RunError | None:
        """Save, write and show the results. Each step is tried, also if an earlier one fails.

        Args:
            status: done, failed or interrupted.
            error: the reason if the sweep is not done.

        Returns:
            The first failure among the steps, which is also in the log.
        """
        if self.interrupted:
            status, error = INTERRUPTED, str(self.signals.interrupted())
        steps: list[Callable[[], None]] = [
            search.pause,
            self.budget.keep,
            lambda: self.results.write(status, error, self.budget.seconds()),
            lambda: self.results.show(self.table),
            lambda: self.table.say(f"results in {self.directory.path}"),
        ]
        failures: list[RunError] = []
        for step in steps:
            try:
                step()
            except Exception as raised:  # storage, disk, plots, analysis
                failures.append(self._logged(raised))
        if failures and status == "done":
            with contextlib.suppress(Exception):  # the failure is reported in any case
                failed = str(failures[0])
                self.results.write("failed", failed, self.budget.seconds(), report=False)
        return failures[0] if failures else None

    def _logged(self, error: Exception) -> RunError:
        """An unexpected error as one line. Writes its traceback to the log."""
        where = "".join(traceback.format_exception(error)).rstrip("\n")
        try:
            self.directory.log(where)
        except OSError as lost:
            return RunError(f"{self.directory.path}: it cannot be written to: {lost}")
        return RunError(f"{first_line(error)} (more in {self.directory.path}/log.txt)")
