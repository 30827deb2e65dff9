"""Watches the head node of a Ray cluster, since Ray does not report its loss.

When the head's control service (GCS) is lost, workers continue for a while. After about a minute
(RAY_gcs_rpc_server_reconnect_timeout_s of each node) every node ends its workers, and Ray ends the
driver's process with exit code 1, without an exception. Before that, the driver must have saved the
run and shown how to resume it.
"""

import socket
import threading
import time

from trainer.messages import HeadLost, HeadRecovered

PROBE_INTERVAL_S = 2.0
PROBE_TIMEOUT_S = 5.0
RETRY_S = 0.2
LOST_AFTER_S = 5.0  # without an answer; a service that restarts is back sooner
STOP_AFTER_S = 45.0  # without an answer; Ray's nodes wait for 60 s


class HeadMonitor:
    """Connects to the head regularly, in a separate thread."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: host:port of the head's control service.
        """
        self.address = address
        self._silent_since: float | None = None  # None: the last attempt was answered
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="head monitor").start()

    @property
    def lost(self) -> bool:
        """Whether the head has not answered for `LOST_AFTER_S`."""
        since = self._silent_since
        return since is not None and time.monotonic() - since >= LOST_AFTER_S

    def message(self) -> HeadLost | HeadRecovered:
        """The current state, for the sinks of the run."""
        since = self._silent_since
        if since is None:
            return HeadRecovered(self.address)
        return HeadLost(self.address, deadline=since + STOP_AFTER_S)

    def answers(self) -> bool:
        """Whether the head answers now. Takes up to `PROBE_TIMEOUT_S`."""
        begun = time.monotonic()
        try:
            probe(self.address, PROBE_TIMEOUT_S)
        except OSError:
            if self._silent_since is None:
                self._silent_since = begun
            return False
        self._silent_since = None
        return True

    def wait_until_known(self) -> bool:
        """Whether the head answers. Without an answer, try again until it counts as lost."""
        while not self.answers():
            if self.lost:
                return False
            time.sleep(RETRY_S)
        return True

    def stop(self) -> None:
        """End the thread. May be called twice."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(PROBE_INTERVAL_S):
            self.answers()


def probe(address: str, timeout_s: float) -> None:
    """Raise OSError if nothing listens at `address`, which is host:port."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
