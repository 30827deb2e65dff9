"""Hosts of a Ray cluster: which are alive, and which have been given notice to leave."""

import contextlib
import threading

import ray
from ray._private.state import state

POLL_INTERVAL_S = 1.0


class NodeMonitor:
    """Asks the head for hosts that will leave, in a separate thread.

    A host gets notice by `ray drain-node`, by the autoscaler before it removes an idle or preempted
    host, and by KubeRay. (Ray has no public function for that; Ray Train calls the same one.)
    """

    def __init__(self) -> None:
        self.draining: set[str] = set()  # Ray's ids of hosts that will leave
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="node monitor")
        self._thread.start()

    def has_left(self, node_id: str) -> bool:
        """Whether a host has left the cluster or will do so. Asks the head, which must answer."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return node_id not in alive or node_id in self.draining

    def stop(self) -> None:
        """End the thread. May be called twice."""
        self._stopped.set()
        self._thread.join(POLL_INTERVAL_S)

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_INTERVAL_S):
            with contextlib.suppress(Exception):  # the head is lost, or Ray shuts down
                self.draining = set(state.get_draining_nodes())
