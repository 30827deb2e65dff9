"""Writes report.html of a finished run. Its imports are slow: import this module at the end."""

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Any

from trainer.errors import RunError, first_line
from trainer.experiment import Experiment
from trainer.report.distributions import Distribution, distributions
from trainer.report.page import page
from trainer.store.checkpoints import Checkpoints
from trainer.store.directory import METRICS, RunDirectory
from trainer.store.serialization import from_bytes


def write_report(
    summary: Mapping[str, Any],
    experiment: Experiment,
    directory: RunDirectory,
    notify: Callable[[str], None],
) -> None:
    """Write report.html. The run is done, so a failure is reported and changes nothing else."""
    try:
        shared = shared_distributions(experiment, directory, notify)
        metrics = directory.entries(METRICS)
        directory.write_report(page(summary, metrics, experiment.settings(), shared))
    except Exception as error:
        with suppress(OSError):  # the disk may be the reason
            directory.log(traceback.format_exc())
        notify(f"report.html could not be written: {first_line(error)} (more in log.txt)")


def shared_distributions(
    experiment: Experiment, directory: RunDirectory, notify: Callable[[str], None]
) -> list[Distribution]:
    """The weights before and after sharing; none if nothing was shared, or checkpoints are gone.

    Args:
        experiment: Of a run that has ended.
        directory: Of the run.
        notify: Called with one line if checkpoints are gone.
    """
    names = list(experiment.phases)
    for before, after in pairwise(experiment.stages):
        new = after.properties - before.properties
        if "sharing" in new and (before.phase >= 0 or experiment.has_initial_weights):
            checkpoints = Checkpoints(directory.path, experiment.config.checkpoint.keep)
            try:
                contents = [checkpoints.weights_after(names, s.phase) for s in (before, after)]
            except RunError as error:
                # Only the cause: the error itself suggests resuming the run, which is already done.
                notify(f"report.html does not show the weights: {error.__cause__}")
                return []
            finally:
                checkpoints.close()
            return distributions(*(from_bytes(content)[0] for content in contents))
    return []
