"""Several worker groups side by side, over one connection to Ray."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.cluster.environment import prepare_environment
from trainer.cluster.group import WorkerGroup
from trainer.cluster.open import open_group
from trainer.config import ClusterConfig

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds, or max, per microseconds


class Fleet:
    """What the groups of a sweep share. `open` it, start `new_group()`s, and `close` it with them.

    `cluster.backend=inline` has room for one group and no connection.
    """

    def __init__(self, cfg: ClusterConfig, groups: int | None) -> None:
        """Args: groups: so many at most; None: as many as there is room for."""
        self._cfg = cfg
        self._inline = cfg.backend == "inline"
        self._limit = 1 if self._inline else groups
        self._session: Any = None  # a RaySession; its module imports Ray

    def open(self) -> None:
        """Connect to the cluster, or start a private Ray. Raises as `WorkerGroup.start`."""
        if self._inline:
            return
        prepare_environment(self._cfg)
        from trainer.cluster.session import RaySession

        self._session = RaySession(self._cfg, self._limit or self._fitting({"CPU": cpus()}))
        self._session.open()

    def size(self) -> int:
        """How many groups to have now: the limit, else what the cluster as it is could hold.

        Without a limit, at least one, which says what is missing where there is room for none.
        """
        if self._limit is not None:
            return self._limit
        import ray

        return self._fitting(ray.cluster_resources())

    def new_group(self) -> WorkerGroup:
        """A group that uses the connection; not started."""
        return open_group(self._cfg)

    def close(self, groups: Iterable[WorkerGroup]) -> None:
        """Stop the groups, also those that are at work, and disconnect. More than once is fine."""
        if self._session is None:
            return
        if not self._session.ends_ray:
            for group in groups:
                group.stop()
        self._session.close()

    def _fitting(self, resources: Mapping[str, float]) -> int:
        cfg = self._cfg
        fitting = resources.get("CPU", 0) / (cfg.workers * cfg.cpus_per_worker)
        gpus = resources.get("GPU", 0) / (cfg.workers * cfg.gpus_per_worker)
        if cfg.device != "cpu" and gpus >= 1:
            fitting = min(fitting, gpus)
        return max(1, math.floor(fitting))


def cpus(quota: Path = QUOTA) -> int:
    """CPUs that this process may use: of its affinity, and of its container's quota."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:
        allowed, period = quota.read_text().split()
        return max(1, min(count, int(allowed) // int(period)))
    except (OSError, ValueError):  # there is none, or it says max
        return count
