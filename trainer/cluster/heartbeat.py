"""Detects workers that hang: collects the heartbeats of all workers and compares them with time.

`HangDetector` decides and does no input or output. `HeartbeatMonitor` asks Ray actors for their
heartbeats and passes the answers to it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

POLL_INTERVAL_S = 0.5  # seconds between two requests for heartbeats, or checks for a stop request
MAX_POLL_GAP_S = 2.0  # a longer time between two polls means that the monitor itself was suspended


@dataclass(frozen=True)
class HeartbeatStatus:
    """The state of one worker's heartbeat at one moment."""

    beats: int  # steps and batches done so far
    busy: bool  # waits for other workers, or does work without progress to count
    position: tuple[int, int]  # phase and step
    where: str  # the position in words


@dataclass
class _Entry:
    status: HeartbeatStatus | None
    active: float  # when the worker last made progress or was busy


class HangDetector:
    """Finds the worker that has made no progress for longer than a time-out.

    A busy worker does not hang: the worker that it waits for does. Time in which the driver
    did not poll, because it was suspended or busy itself, is not counted. All times are
    seconds of one clock.
    """

    def __init__(self, size: int, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._entries = [_Entry(None, now) for _ in range(size)]
        self._running = set(range(size))
        self._polled = now

    def finish(self, rank: int) -> None:
        """Stop watching `rank`, whose worker function has ended."""
        self._running.discard(rank)

    def poll(self, now: float) -> None:
        """Record that the monitor is alive. Call it regularly, before `update` and `hung_rank`."""
        gap = now - self._polled - MAX_POLL_GAP_S
        self._polled = now
        if gap > 0:
            for entry in self._entries:
                entry.active += gap

    def update(self, rank: int, status: HeartbeatStatus, now: float) -> None:
        """Record the heartbeat of `rank`."""
        entry = self._entries[rank]
        if entry.status is None or status.busy or status.beats != entry.status.beats:
            entry.active = now
        entry.status = status

    def last_status(self, rank: int) -> HeartbeatStatus | None:
        """The last heartbeat of `rank`; None before the first one."""
        return self._entries[rank].status

    def hung_rank(self, now: float) -> int | None:
        """The running worker without progress for longest, if that exceeds the time-out."""
        rank = min(self._running, key=lambda r: (self._entries[r].active, r), default=None)
        if rank is None or now - self._entries[rank].active <= self._timeout_s:
            return None
        return rank


class HeartbeatMonitor:
    """Asks every worker for its heartbeat, with one request under way per worker."""

    def __init__(self, actors: Sequence[Any], timeout_s: float) -> None:
        self._actors = actors
        self._detector = HangDetector(len(actors), timeout_s, time.monotonic())
        self._requests: dict[Any, int] = {}
        self._polled = 0.0

    def poll(self) -> int | None:
        """Collect the answers, send new requests, and return the rank that hangs, if any.

        Calls that follow within `POLL_INTERVAL_S` do nothing, so the caller may loop quickly.
        """
        now = time.monotonic()
        if now - self._polled < POLL_INTERVAL_S:
            return None
        self._polled = now
        self._detector.poll(now)
        if self._requests:
            requests = list(self._requests)
            answered, _ = ray.wait(requests, num_returns=len(requests), timeout=0)
            for ref in answered:
                rank = self._requests.pop(ref)
                try:
                    status = ray.get(ref)
                except RayError:  # the worker died: its stream of messages reports that
                    continue
                if status is not None:
                    self._detector.update(rank, status, now)
        for rank in set(range(len(self._actors))) - set(self._requests.values()):
            self._requests[self._actors[rank].heartbeat.remote()] = rank
        return self._detector.hung_rank(now)

    def finish(self, rank: int) -> None:
        """Stop watching `rank`, whose worker function has ended; the others may run longer."""
        self._detector.finish(rank)

    def last_status(self, rank: int) -> HeartbeatStatus | None:
        """The last heartbeat of `rank`; None before the first one."""
        return self._detector.last_status(rank)
