"""A sweep as its command sees it: folder, workers, study; then the search; in the end, results."""

import contextlib
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
) -> dict[str, Any] | None:
    """Search `cfg.sweep.params`, or go on where the sweep in `folder` stopped.

    Args:
        cfg: typed.
        base: the same as composed, interpolations not resolved.
        folder: the sweep's own; made if need be.
        arguments: The command line, for the commands that repeat a trial; None: the sweep was
            started from Python.
        signals: the first one saves and ends the sweep, the second one ends it at once.

    Returns:
        The plain configuration of the best trial where `sweep.refit` wants it run in full.

    Raises:
        ConfigError: before any trial began; a new folder is not left behind.
        RunError: no trial was completed, no workers could be had, or whatever else went wrong;
            log.txt holds the traceback.
        Interrupted: likewise; the same command goes on.
    """
    plan = Plan(cfg, base, objects)
    folder = folder.resolve()
    new = not folder.exists()
    directory = RunDirectory.claim(folder) if new else RunDirectory(folder)
    try:
        if new or not (folder / "config.yaml").exists():
            directory.write_command(arguments)
            directory.write_config(plan.unresolved())
        with ExitStack() as locks:
            return _Sweep(plan, directory, arguments, signals, locks).execute()
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
    ) -> None:
        self.plan, self.cfg, self.sweep = plan, plan.cfg, plan.cfg.sweep
        self.directory, self.signals, self.locks = directory, signals, locks
        self.arguments = arguments
        self.board = LiveTable(self.sweep, directory, total_trials(self.sweep, plan.space))
        self.pool = Pool(self.cfg, self.board.say)
        self.interrupted = False  # by the first signal
        self.saved = False  # what is known, since then

    def execute(self) -> dict[str, Any] | None:
        """Search, and leave the results. Returns as `run_sweep`."""
        self.locks.enter_context(self.directory.locked(self.board.say))
        try:
            with self.signals.deferring(self.board.restore, self._interrupt):
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
        """The first signal. Within its handler, no more than this can be done safely."""
        self.interrupted = True

    def _open(self, opened: ExitStack) -> None:
        with ThreadPoolExecutor(1) as background:
            checked = background.submit(self.plan.check)
            try:
                self.pool.open()
            except RunError:
                checked.result()  # a wrong configuration would explain more
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
        """Refuse what would go on without what an earlier command has left."""
        folder = self.directory.path
        if self._resumed and not self.directory.has_command():
            raise ConfigError(
                f"resume={folder}: command.json is gone; give the sweep's own command instead"
            )
        kept = self.directory.read_config().get("sweep", {}).get("storage")
        storage = self.plan.unresolved()["sweep"].get("storage")
        if kept != storage and any((folder / name).exists() for name in ("study.db", "owner")):
            raise ConfigError(
                f"sweep.storage={without_password(self.sweep.storage)}: the trials of {folder} are "
                "in another one; choose another sweep.name, or, if the data base has moved, change "
                "config.yaml there"
            )

    def _keep_settings(self) -> None:
        """Let the folder have the settings with which resume= goes on, and the command.

        Of a study that has just begun, all of them: an earlier command may have failed before.
        config.yaml is the lock too: the new one is locked before the old one is let go.
        """
        if not self._resumed and (self.study.new or not self.directory.has_command()):
            self.directory.write_command(self.arguments)
        kept, now = self.directory.read_config(), self.plan.unresolved()
        if not self.study.new:
            now = {**kept, "sweep": {**kept["sweep"], **self.plan.free()}}
        if now != kept:
            self.directory.write_config(now)
            self.locks.enter_context(self.directory.locked(self.board.say))

    def _search(self) -> dict[str, Any] | None:
        search = Search(self.plan, self.study, self.pool, self.board, self.budget, self.directory)
        try:
            with self.board:
                search.run(self._asked_to_stop)
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
            told = self._logged(error)
            self._finish(search, "failed", str(told))
            raise told from error
        if failed := self._finish(search, "done", None):
            raise failed
        if not self.sweep.refit or self.study.leader is None:
            return None
        return self.plan.winner(self.study.leader.params)

    def _asked_to_stop(self) -> bool:
        if self.interrupted and not self.saved:
            self.saved = True  # at once, since a second signal would leave no time for it
            self.budget.keep()
            error = str(self.signals.interrupted())
            self.results.write(INTERRUPTED, error, self.budget.seconds(), report=False)
        return self.interrupted

    def _finish(self, search: Search, status: str, error: str | None) -> RunError | None:
        """Save, write and show all that is known. A part that fails keeps no other from its work.

        Args:
            error: why the sweep has not come to its end; None: it has.

        Returns:
            The first failure among the parts; it is in the log.
        """
        if self.interrupted:
            status, error = INTERRUPTED, str(self.signals.interrupted())
        parts: list[Callable[[], None]] = [
            search.pause,
            self.budget.keep,
            lambda: self.results.write(status, error, self.budget.seconds()),
            lambda: self.results.show(self.board),
            lambda: self.board.say(f"results in {self.directory.path}"),
        ]
        failures: list[RunError] = []
        for part in parts:
            try:
                part()
            except Exception as raised:  # storage, disk, plots, analysis
                failures.append(self._logged(raised))
        if failures and status == "done":
            with contextlib.suppress(Exception):  # the summary comes first, and the rest is told
                failed = str(failures[0])
                self.results.write("failed", failed, self.budget.seconds(), report=False)
        return failures[0] if failures else None

    def _logged(self, error: Exception) -> RunError:
        """An error that nobody expected, as one line; where it came from goes into the log."""
        where = "".join(traceback.format_exception(error)).rstrip("\n")
        try:
            self.directory.log(where)
        except OSError as lost:
            return RunError(f"{self.directory.path}: it cannot be written to: {lost}")
        return RunError(f"{first_line(error)} (more in {self.directory.path}/log.txt)")
