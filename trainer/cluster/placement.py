"""Room for a gang of workers in a Ray cluster: what they need, and waiting until it is there."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from trainer.cluster.group import NoRoom
from trainer.cluster.signs import LOOK_EVERY_S
from trainer.config import ClusterConfig
from trainer.errors import ConfigError


class Room:
    """The places of `cluster.workers` workers, reserved together or not at all."""

    def __init__(self, cfg: ClusterConfig) -> None:
        self.device = "cpu"  # what the workers train on; `reserve` decides
        self.group: PlacementGroup | None = None  # a bundle per worker, once reserved
        self._cfg = cfg

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        bundle = {"CPU": self._cfg.cpus_per_worker}
        if self.device == "cuda":
            bundle["GPU"] = self._cfg.gpus_per_worker
        return bundle

    def reserve(self, heed_stop: Callable[[], None]) -> None:
        """Choose the device, and wait for the places.

        Args:
            heed_stop: called between two looks; what it raises ends the wait.

        Raises:
            ConfigError: the cluster as it is can never hold all workers, or lacks GPUs.
            NoRoom: it could, but others are there.
        """
        self.device = self._choose_device()
        self.group = placement_group([self.bundle] * self._cfg.workers, strategy="PACK")
        if not self._found(heed_stop):
            message, forever = self._shortage()
            raise ConfigError(message) if forever else NoRoom(message)

    def keep(self, heed_stop: Callable[[], None]) -> None:
        """Return when every worker has its place: at once, unless a node went away meanwhile.

        Args: as of `reserve`.

        Raises:
            NoRoom: no other node came in its place.
        """
        if not self._found(heed_stop):
            raise NoRoom(self._shortage()[0])

    def _found(self, heed_stop: Callable[[], None]) -> bool:
        """Whether there are places for all within the time-out; if not, none is kept."""
        assert self.group is not None
        deadline = time.monotonic() + self._cfg.start_timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if self.group.wait(min(left, LOOK_EVERY_S)):
                return True
            heed_stop()
        self.free()
        return False

    def _shortage(self) -> tuple[str, bool]:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        missing, forever = shortage(
            self.bundle, self._cfg.workers, nodes, ray.available_resources()
        )
        message = (
            f"no room for cluster.workers={self._cfg.workers} within cluster.start_timeout_s="
            f"{self._cfg.start_timeout_s:g}: {missing}"
        )
        return message, forever

    def free(self) -> None:
        """Give the places back."""
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    def without_cuda(self, reason: str) -> str:
        """cpu, unless CUDA is insisted on: then a ConfigError."""
        if self._cfg.device == "cuda":
            raise ConfigError(
                f"cluster.device=cuda: {reason}; use fewer workers or cluster.device=cpu"
            )
        return "cpu"

    def _choose_device(self) -> str:
        """cpu or cuda. Raises ConfigError where CUDA is asked for and the cluster lacks it."""
        if self._cfg.device == "cpu":
            return "cpu"
        wanted = self._cfg.workers * self._cfg.gpus_per_worker
        found = ray.cluster_resources().get("GPU", 0)
        if found < wanted:
            return self.without_cuda(
                f"{wanted:g} GPUs are needed (cluster.workers={self._cfg.workers} x "
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
    """Why workers find no place, in words, and whether the nodes could never hold them all.

    Args:
        bundle: what one worker needs; it gets that from a single node.
        nodes: what each living node has in all.
        free: what all nodes together have left.
    """
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in bundle}
    missing = "; ".join(
        f"{amount * workers:g} {kind} needed, {free.get(kind, 0):g} of {total[kind]:g} free"
        for kind, amount in bundle.items()
    )
    places = sum(
        min(math.floor(node.get(kind, 0) / amount) for kind, amount in bundle.items())
        for node in nodes
    )
    if places < workers and all(amount * workers <= total[kind] for kind, amount in bundle.items()):
        needed = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
        missing += f"; each worker needs {needed} of one node, and only {places} find that"
    return missing, places < workers
