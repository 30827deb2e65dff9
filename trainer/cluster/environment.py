"""Environment variables that must be set before Ray is imported, which reads them only then."""

import os
import secrets
import sys

from trainer.config import ClusterConfig


def prepare_environment(cfg: ClusterConfig) -> None:
    """Set Ray's environment variables; a private Ray gets a token known to its processes only."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # merging similar lines would lose some
    if cluster_address(cfg) is None and "ray" not in sys.modules:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # bind loopback only, on Linux too
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ["RAY_worker_niceness"] = str(cfg.nice)  # noqa: SIM112 - Ray's spelling


def cluster_address(cfg: ClusterConfig) -> str | None:
    """The address of the cluster to join; None: start a private one."""
    return cfg.address or os.environ.get("RAY_ADDRESS") or None
