"""Several worker groups side by side, over one connection to Ray."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from trainer.cluster.environment import available_cpus, prepare_environment
from trainer.cluster.group import WorkerGroup
from trainer.cluster.open import open_group
from trainer.config import ClusterConfig


class Fleet:
    """The worker groups of a sweep: call `open`, then `new_group` and `start`, finally `close`.

    With `cluster.backend=inline` there is one group and no connection.
    """

    def __init__(self, cfg: ClusterConfig, groups: int | None) -> None:
        """
        Args:
            cfg: the settings of every group.
            groups: maximum number of groups; None: as many as the cluster can hold.
        """
        self._cfg = cfg
        self._inline = cfg.backend == "inline"
        self._limit = 1 if self._inline else groups
        self._connection: Any = None  # a RayConnection, whose module imports Ray

    def open(self) -> None:
        """Connect to the cluster, or start a private Ray. Raises as `WorkerGroup.start`."""
        if self._inline:
            return
        prepare_environment()
        from trainer.cluster.connection import RayConnection

        groups = self._limit or self._capacity({"CPU": available_cpus()})
        self._connection = RayConnection(self._cfg, groups)
        self._connection.open()

    def size(self) -> int:
        """The number of groups to run now: the maximum, or as many as the cluster can hold now.

        Without a maximum the result is at least 1, so that the start of that group reports which
        resources are missing.

        Raises:
            ClusterLost: the head node of the cluster does not answer.
        """
        if self._connection is not None:
            self._connection.check_head()
        if self._limit is not None:
            return self._limit
        import ray

        return self._capacity(ray.cluster_resources())

    def new_group(self) -> WorkerGroup:
        """A group that uses the connection, not started yet."""
        return open_group(self._cfg)

    def wait(self, groups: Collection[WorkerGroup], timeout_s: float) -> list[WorkerGroup]:
        """The groups for which messages have arrived, after waiting for the first one.

        Args:
            groups: at least one, all of which are at a `Step.WAIT`.
            timeout_s: maximum time to wait, in seconds.
        """
        from trainer.cluster.streams import all_ready

        owners = {stream: group for group in groups for stream in group.streams}
        found = all_ready(owners, timeout_s)
        return list(dict.fromkeys(owners[stream] for stream in found))

    def close(self, groups: Iterable[WorkerGroup]) -> None:
        """Stop the groups, also those that are running, and disconnect. May be called twice."""
        if self._connection is None:
            return
        if not self._connection.ends_ray:
            for group in groups:
                group.stop()
        self._connection.close()

    def _capacity(self, resources: Mapping[str, float]) -> int:
        cfg = self._cfg
        groups = resources.get("CPU", 0) / (cfg.workers * cfg.cpus_per_worker)
        by_gpu = resources.get("GPU", 0) / (cfg.workers * cfg.gpus_per_worker)
        if cfg.device != "cpu" and by_gpu >= 1:
            groups = min(groups, by_gpu)
        return max(1, math.floor(groups))
