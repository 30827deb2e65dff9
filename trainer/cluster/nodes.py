"""Which hosts of a Ray cluster are alive, have been given notice to leave, or do not answer."""

import contextlib
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import state

from trainer.cluster.head import probe

POLL_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 3.0  # for a connection to a host, which its kernel accepts also under load


def alive_nodes() -> dict[str, dict[str, Any]]:
    """What Ray knows about each host that it takes for alive, by Ray's id. Asks the head."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def draining_nodes() -> set[str]:
    """Ray's ids of the hosts that have notice to leave. Asks the head.

    A host gets notice by `ray drain-node`, by the autoscaler before it removes an idle or preempted
    host, and by KubeRay. (Ray has no public function for that; Ray Train calls the same one.)
    """
    return set(state.get_draining_nodes())


def lost_nodes(node_ids: Iterable[str]) -> set[str]:
    """Those of the hosts on which no worker should start: gone, with notice, or not answering.

    Ray itself notices only after 20 to 65 s that a host is lost without closing its connections.
    """
    wanted, alive, draining = set(node_ids), alive_nodes(), draining_nodes()
    running = [node_id for node_id in wanted if node_id in alive and node_id not in draining]
    if not running:
        return wanted
    with ThreadPoolExecutor(len(running)) as threads:
        answers = threads.map(lambda node_id: _answers(alive[node_id]), running)
        return wanted - {node_id for node_id, there in zip(running, answers, strict=True) if there}


def _answers(node: dict[str, Any]) -> bool:
    """Whether Ray's service on a host accepts a connection."""
    try:
        probe(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}", PROBE_TIMEOUT_S)
    except OSError:
        return False
    return True


class NodeMonitor:
    """Asks for hosts that will leave, and for silent ones that answer again, in its own thread.

    A host that Ray itself has found to be lost is silent no longer: nothing starts there, and if it
    returns, it has another id. So the silent hosts do not accumulate while nodes come and go.
    """

    def __init__(self) -> None:
        self.draining: set[str] = set()  # Ray's ids of hosts that will leave
        self.silent: dict[str, str] = {}  # Ray's id -> name of hosts that do not answer
        self._lock = threading.Lock()  # of changes of `silent`
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="node monitor")
        self._thread.start()

    def add_silent(self, hosts: Mapping[str, str]) -> None:
        """Add hosts on which a worker does not answer, until a check finds that they do."""
        with self._lock:
            self.silent = {**self.silent, **hosts}

    def stop(self) -> None:
        """End the thread. May be called twice."""
        self._stopped.set()
        self._thread.join(POLL_INTERVAL_S)

    def check(self) -> None:
        """Ask the head, and the silent hosts; forget those that answer or that Ray has removed.

        Blocks for up to `PROBE_TIMEOUT_S` seconds.
        """
        self.draining = draining_nodes()
        if checked := self.silent:
            silent = lost_nodes(checked) & alive_nodes().keys()
            found = checked.keys() - silent
            with self._lock:
                self.silent = {id_: name for id_, name in self.silent.items() if id_ not in found}

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_INTERVAL_S):
            with contextlib.suppress(Exception):  # the head is lost, or Ray shuts down
                self.check()
