"""The environment of this process: its CPUs, and the Ray cluster that variables name."""

import logging
import os
import warnings
from pathlib import Path

from trainer.config import ClusterConfig

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "QUOTA PERIOD" in us, or "max PERIOD"


def prepare_environment() -> None:
    """Set the environment variables that Ray reads when it is imported. Call it before that.

    In a notebook, Ray and tqdm suggest packages for displays that this project does not use; these
    two messages are turned off.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # merging similar lines would lose some
    logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "IProgress not found")


def cluster_address(cfg: ClusterConfig) -> str | None:
    """The address of the cluster to join; None: start a private one."""
    return cfg.address or os.environ.get("RAY_ADDRESS") or None


def available_cpus(quota: Path = CPU_QUOTA) -> int:
    """The number of CPUs that this process may use, by its affinity and its container's quota."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:
        allowed, period = quota.read_text().split()
        return max(1, min(count, int(allowed) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return count


def too_few_cpus(cfg: ClusterConfig, cpus: int) -> str | None:
    """One line if the workers of one machine have more threads than it has CPUs; otherwise None."""
    threads = cfg.threads or max(1, int(cfg.cpus_per_worker))
    if cfg.workers == 1 or cfg.workers * threads <= cpus:
        return None
    fitting = max(1, cpus // threads)
    each = "" if threads == 1 else f" of {threads} threads each"
    return (
        f"cluster.workers={cfg.workers}{each} on {cpus} {'CPU' if cpus == 1 else 'CPUs'}: they "
        f"share them, so training is hardly faster than with cluster.workers={fitting}"
    )
