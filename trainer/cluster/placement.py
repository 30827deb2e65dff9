"""Reserves resources for the workers of a group in a Ray cluster, and waits until they are free."""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import ray
from ray._private.state import state
from ray.util.placement_group import (
    NODE_ID_LABEL_KEY,
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from trainer.cluster.group import InsufficientResources
from trainer.cluster.heartbeat import POLL_INTERVAL_S
from trainer.cluster.nodes import alive_nodes
from trainer.config import ClusterConfig
from trainer.errors import ConfigError


class Placement:
    """The resources of `cluster.workers` workers, reserved together or not at all."""

    def __init__(self, cfg: ClusterConfig) -> None:
        self.device = "cpu"  # the type of device that the workers train on, chosen by `reserve`
        self.notice: str | None = None  # why device=auto leaves GPUs unused; None: it does not
        self.group: PlacementGroup | None = None  # a bundle per worker, if reserved together
        # Hosts of lost workers that are gone, though Ray may not know it yet: Ray's id -> name.
        self.lost: dict[str, str] = {}
        # Hosts that cannot reach each other: one that is avoided, the other one, and it in words.
        self._links: list[tuple[str, str, str]] = []
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
        self._reserve()
        if not self._wait(check_stop):
            message, permanent = self.shortage()
            raise ConfigError(message) if permanent else InsufficientResources(message)

    def move(self, check_stop: Callable[[], None]) -> None:
        """Reserve resources on other hosts, as `avoided` says. Ray ends the workers of the group.

        Args:
            check_stop: as for `reserve`.

        Raises:
            InsufficientResources: there are none.
        """
        self.free()
        self._reserve()
        self.keep(check_stop)

    def _reserve(self) -> None:
        workers, selector = self._cfg.workers, self.selector()
        self.group = placement_group(
            [self.bundle] * workers,
            strategy="PACK",
            bundle_label_selector=[selector] * workers if selector else None,
        )

    def host_of(self, rank: int) -> str:
        """Ray's id of the host on which a rank's resources are; empty: not known."""
        assert self.group is not None
        return str(placement_group_table(self.group)["bundles_to_node_id"].get(rank, ""))

    def disconnected(self, links: Mapping[frozenset[str], str], keep: str = "") -> None:
        """Avoid hosts so that all others can reach each other, as long as the others are alive.

        Args:
            links: pairs of hosts that cannot, by Ray's ids -> what is wrong, in words.
            keep: the host that should rather not be avoided.
        """
        capacity = {
            node_id: capacity_of(self.bundle, node["Resources"])
            for node_id, node in alive_nodes().items()
        }
        avoided = to_avoid(links, capacity, keep)
        for link, text in links.items():
            for host in link & avoided:
                (other,) = link - {host}
                self._links.append((host, other, text))

    def avoided(self) -> set[str]:
        """Ray's ids of the hosts on which no worker should start."""
        alive = alive_nodes()
        return self.lost.keys() | {host for host, other, _ in self._links if other in alive}

    def selector(self) -> dict[str, str]:
        """Ray's label selector of the hosts to use; empty: all."""
        hosts = self.avoided()
        return {NODE_ID_LABEL_KEY: f"!in({','.join(sorted(hosts))})"} if hosts else {}

    def fits(self) -> bool:
        """Whether the hosts that are not avoided could hold all workers."""
        return not self.shortage()[1]

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
        avoided = self.avoided()
        usable = {id_: node for id_, node in alive_nodes().items() if id_ not in avoided}
        available = state.available_resources_per_node()
        free: Counter[str] = Counter()
        for node_id in usable:
            free.update(available.get(node_id, {}))
        nodes = [node["Resources"] for node in usable.values()]
        missing, permanent = shortage(self.bundle, self._cfg.workers, nodes, free)
        reasons = [f"{name} is lost" for name in self.lost.values()]
        reasons += [text for host, _, text in self._links if host in avoided]
        message = (
            f"no room for cluster.workers={self._cfg.workers} within cluster.start_timeout_s="
            f"{self._cfg.start_timeout_s:g}: {'; '.join([*reasons, missing])}"
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
    capacity = sum(capacity_of(bundle, node) for node in nodes)
    enough_in_total = all(amount * workers <= total[kind] for kind, amount in bundle.items())
    if capacity < workers and enough_in_total:
        needed = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
        missing += f"; each worker needs {needed} of one node, and only {capacity} find that"
    if 0 < capacity < workers:
        missing += f"; add hosts, or set cluster.workers={capacity}"
    return missing, capacity < workers


def capacity_of(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    """The number of workers that a node can hold."""
    return min(math.floor(node.get(kind, 0) / amount) for kind, amount in bundle.items())


def to_avoid(
    links: Iterable[Collection[str]], capacity: Mapping[str, int], keep: str = ""
) -> set[str]:
    """The hosts without which any two of the others can reach each other.

    Args:
        links: pairs of hosts that cannot.
        capacity: the number of workers that each living host can hold.
        keep: the host to rather use.

    Returns:
        Repeatedly the host that most of the others cannot reach; among equals the one that holds
        the fewest workers.
    """
    rest = [link for link in links if all(host in capacity for host in link)]
    found: set[str] = set()
    while rest:
        counts = Counter(host for link in rest for host in link)
        worst = max(counts, key=lambda h: (counts[h], h != keep, -capacity[h], h))
        found.add(worst)
        rest = [link for link in rest if worst not in link]
    return found
