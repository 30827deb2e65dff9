"""Workers that stay warm between the runs of one Python process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.cluster import WorkerGroup, open_group
from trainer.config import ClusterConfig, to_dataclass
from trainer.errors import ConfigError
from trainer.experiment import Experiment, describe_cluster
from trainer.library.result import Result
from trainer.library.runs import check_experiment, execute
from trainer.signals import Signals


class Session:
    """Starts workers once and runs any number of experiments on them.

        with trainer.Session(workers=2) as session:
            for sparsity in (0.8, 0.9, 0.95):
                session.run(model=LeNet5, data=data, phases=[Train(), Prune(sparsity)])

    The workers start with the first run, and run all later ones without starting Ray, importing
    torch, or connecting again. A worker that was lost is replaced before the next run.

    Args:
        workers: Number of data-parallel workers. By default 2, and 1 for "inline".
        cluster: Further settings of the section `cluster`, such as
            `{"address": "10.0.0.5:6379", "device": "cuda"}`; or "inline": this process is the only
            worker.
        progress: Whether to print the progress of runs.

    Raises:
        ConfigError: A setting is unknown or not allowed.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        cluster: str | ClusterConfig | Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        settings = describe_cluster(cluster, workers)
        self.cluster = to_dataclass(ClusterConfig, settings, "cluster")
        self._progress = progress
        self._group: WorkerGroup | None = None
        self._reconnect = False  # the last run failed, so that the workers must connect again
        self._closed = False

    def run(
        self,
        experiment: Experiment | None = None,
        *,
        out: str | Path | None = None,
        **settings: Any,
    ) -> Result:
        """Run an experiment on the session's workers. Arguments as of `trainer.run`."""
        if self._closed:
            raise RuntimeError("this session is closed: open another one")
        if own := sorted({"cluster", "workers"} & set(settings)):
            raise ConfigError(f"{own[0]}: the workers are those of the session; pass it to Session")
        if experiment is None:
            experiment = Experiment(**settings, cluster=self.cluster)
        else:
            check_experiment(experiment, settings)
            experiment = experiment.with_cluster(self.cluster)
        signals = Signals()
        with signals.installed():
            group = self._ready_group(signals)
            self._reconnect = True
            result = execute(experiment, out, self._progress, signals, group)
            self._reconnect = False
        return result

    def close(self) -> None:
        """End the workers. Calling it again does nothing."""
        self._closed = True
        self._drop()

    def _ready_group(self, signals: Signals) -> WorkerGroup:
        """Started workers that are all alive."""
        with signals.deferring(lambda: None):
            if self._group is not None:
                # Ctrl-C during the last run set it, even if the run was over before it could stop.
                self._group.stop_requested.clear()
            if self._group is not None and self._reconnect:
                self._group.restart()
            elif self._group is not None and not self._group.alive():
                self._drop()
            if self._group is None:
                group = open_group(self.cluster)
                try:
                    group.start()
                except BaseException:
                    group.stop()
                    raise
                self._group = group
        return self._group

    def _drop(self) -> None:
        if self._group is not None:
            self._group.stop()
            self._group = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
