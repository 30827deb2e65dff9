"""Reserves resources for the workers of a group in a Ray cluster, and waits until they are free."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from trainer.cluster.group import InsufficientResources
from trainer.cluster.heartbeat import POLL_INTERVAL_S
from trainer.config import ClusterConfig
from trainer.errors import ConfigError


class Placement:
    """The resources of `cluster.workers` workers, reserved together or not at all."""

    def __init__(self, cfg: ClusterConfig) -> None:
        self.device = "cpu"  # the type of device that the workers train on, chosen by `reserve`
        self.notice: str | None = None  # why device=auto leaves GPUs unused; None: it does not
        self.group: PlacementGroup | None = None  # a bundle per worker, if reserved together
        self._cfg = cfg

    @property
    def bundle(self) -> dict[str, float]:
        """The resources that Ray reserves for one worker."""
        bundle = {"CPU": self._cfg.cpus_per_worker}
        if self.device == "cuda":
            bundle["GPU"] = self._cfg.gpus_per_worker
        return bundle

    def reserve(self, check_stop: Callable[[], None]) -> None:
        """Choose the device, and wait until the resources of all workers are reserved.

        Args:
            check_stop: called regularly; an exception that it raises ends the wait.

        Raises:
            ConfigError: the cluster can never hold all workers, or lacks GPUs.
            InsufficientResources: it could, but other work occupies it.
        """
        self.choose_device()
        self.group = placement_group([self.bundle] * self._cfg.workers, strategy="PACK")
        if not self._wait(check_stop):
            message, permanent = self.shortage()
            raise ConfigError(message) if permanent else InsufficientResources(message)

    def keep(self, check_stop: Callable[[], None]) -> None:
        """Wait until every worker has its resources again; returns at once unless a node was lost.

        Args:
            check_stop: as for `reserve`.

        Raises:
            InsufficientResources: no other node replaced it.
        """
        if not self._wait(check_stop):
            raise InsufficientResources(self.shortage()[0])

    def free(self) -> None:
        """Release the resources."""
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    def without_cuda(self, reason: str) -> str:
        """Return "cpu", and keep the reason as `notice` if the cluster has GPUs.

        Raises:
            ConfigError: cluster.device=cuda; the message is the reason.
        """
        if self._cfg.device == "cuda":
            raise ConfigError(
                f"cluster.device=cuda: {reason}; use fewer workers or cluster.device=cpu"
            )
        if gpus := ray.cluster_resources().get("GPU", 0):
            self.notice = (
                f"cluster.device=auto: training on the CPU, although Ray finds GPUs ({gpus:g}): "
                f"{reason}"
            )
        return "cpu"

    def _wait(self, check_stop: Callable[[], None]) -> bool:
        """Whether all workers have resources within the time-out. Otherwise release them all."""
        assert self.group is not None
        deadline = time.monotonic() + self._cfg.start_timeout_s
        while (remaining := deadline - time.monotonic()) > 0:
            if self.group.wait(min(remaining, POLL_INTERVAL_S)):
                return True
            check_stop()
        self.free()
        return False

    def shortage(self) -> tuple[str, bool]:
        """The reason why resources were missing, and whether the cluster can never have them."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        missing, permanent = shortage(
            self.bundle, self._cfg.workers, nodes, ray.available_resources()
        )
        message = (
            f"no room for cluster.workers={self._cfg.workers} within cluster.start_timeout_s="
            f"{self._cfg.start_timeout_s:g}: {missing}"
        )
        return message, permanent

    def choose_device(self) -> None:
        """Set `device`. Raises ConfigError if CUDA is required and unavailable."""
        self.device = self._device()

    def _device(self) -> str:
        if self._cfg.device == "cpu":
            return "cpu"
        needed = self._cfg.workers * self._cfg.gpus_per_worker
        found = ray.cluster_resources().get("GPU", 0)
        if found < needed:
            return self.without_cuda(
                f"{needed:g} GPUs are needed (cluster.workers={self._cfg.workers} x "
                f"cluster.gpus_per_worker={self._cfg.gpus_per_worker:g}), {found:g} found"
            )
        if self._cfg.workers > 1 and self._cfg.gpus_per_worker < 1:
            return self.without_cuda("NCCL takes one GPU per rank")
        return "cuda"


def shortage(
    bundle: Mapping[str, float],
    workers: int,
    nodes: Sequence[Mapping[str, float]],
    free: Mapping[str, float],
) -> tuple[str, bool]:
    """Explain why the workers find no resources.

    Args:
        bundle: what one worker needs, all of it on a single node.
        workers: the number of workers.
        nodes: the total resources of each living node.
        free: the free resources of all nodes together.

    Returns:
        The explanation, and whether the nodes could not hold all workers even if all were free.
    """
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in bundle}
    missing = "; ".join(
        f"{amount * workers:g} {kind} needed, {free.get(kind, 0):g} of {total[kind]:g} free"
        for kind, amount in bundle.items()
    )
    capacity = sum(
        min(math.floor(node.get(kind, 0) / amount) for kind, amount in bundle.items())
        for node in nodes
    )
    enough_in_total = all(amount * workers <= total[kind] for kind, amount in bundle.items())
    if capacity < workers and enough_in_total:
        needed = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
        missing += f"; each worker needs {needed} of one node, and only {capacity} find that"
    return missing, capacity < workers
