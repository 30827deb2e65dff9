"""Workers that start in the background, to join a group of an elastic run."""

import time
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.exceptions import RayError

from trainer.cluster.rank import Rank

RETRY_S = 2.0  # pause before a worker that failed to start is replaced


class Recruits:
    """Requests workers from Ray, which starts them when and where the cluster has resources.

    A pending worker is a demand that Ray's autoscaler sees, so that it adds a host if it may.
    """

    def __init__(self, new_actor: Callable[[], Any]) -> None:
        self._new_actor = new_actor
        self._starting: dict[Any, Any] = {}  # pending answer -> actor
        self._ready: list[Rank] = []
        self._next_request = 0.0

    def poll(self, wanted: int) -> int:
        """Request workers until `wanted` are starting or ready; return how many are ready."""
        if self._starting:
            refs = list(self._starting)
            answered, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            for ref in answered:
                actor = self._starting.pop(ref)
                try:
                    self._ready.append(Rank(actor, *ray.get(ref)))
                except RayError:  # its host was lost, or it could not start there
                    self._next_request = time.monotonic() + RETRY_S
        missing = wanted - len(self._ready) - len(self._starting)
        if missing > 0 and time.monotonic() >= self._next_request:
            for _ in range(missing):
                actor = self._new_actor()
                self._starting[actor.identity.remote()] = actor
        return len(self._ready)

    def take(self, limit: int) -> list[Rank]:
        """Remove up to `limit` workers that are ready, and return them."""
        taken, self._ready = self._ready[: max(0, limit)], self._ready[max(0, limit) :]
        return taken

    def discard(self, node_ids: Collection[str]) -> None:
        """End the workers on some hosts, and those whose host is not known yet.

        The next `poll` requests others, wherever workers may start then.
        """
        for rank in self._ready:
            if rank.node_id in node_ids:
                ray.kill(rank.actor)
        for actor in self._starting.values():
            ray.kill(actor)
        self._starting = {}
        self._ready = [rank for rank in self._ready if rank.node_id not in node_ids]

    def actors(self) -> list[Any]:
        """All workers that have not been taken."""
        return [*self._starting.values(), *(rank.actor for rank in self._ready)]
