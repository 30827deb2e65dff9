"""The slots of a sweep, each of which runs one trial at a time on its own warm workers.

A slot is a worker group and a thread of the driver that runs trials on it. The threads report to
the driver's main thread by events in one queue. There are as many slots as the cluster can
hold, while nodes join and leave.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.cluster import Fleet, WorkerGroup
from trainer.config import Config
from trainer.errors import RunError, first_line

PAUSE_S = 5.0  # pause before the next attempt to start a slot's workers
COUNT_EVERY_S = 5.0  # interval of checks of the cluster's size
SETTLE_S = 5.0  # how long to wait for a slot without a trial to end


@dataclass(frozen=True)
class SlotReady:
    """The slot is ready for a trial."""

    slot: "Slot"


@dataclass(frozen=True)
class StartFailed:
    """The slot's workers did not start; it tries again after a pause."""

    slot: "Slot"
    error: Exception


@dataclass(frozen=True)
class TrialMessage:
    """A message of the slot's trial (trainer.messages)."""

    slot: "Slot"
    message: Any


@dataclass(frozen=True)
class TrialEnded:
    """The slot's trial has ended; `error` is the reason if it failed."""

    slot: "Slot"
    error: Exception | None


@dataclass(frozen=True)
class TrialRequeued:
    """The slot's trial did not begin, since its workers were lost. The slot gets new ones."""

    slot: "Slot"


Event = SlotReady | StartFailed | TrialMessage | TrialEnded | TrialRequeued


class Slot:
    """Runs one trial at a time on warm workers. All methods are for the main thread.

    The workers are replaced after an error, and after `sweep.recycle_after` trials.
    """

    def __init__(
        self, fleet: Fleet, events: "queue.SimpleQueue[Event]", recycle_after: int
    ) -> None:
        self.trial: int | None = None  # number of the trial that it runs
        self.group: WorkerGroup | None = None
        self._fleet = fleet
        self._events = events
        self._recycle_after = recycle_after
        self._jobs: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._starting: WorkerGroup | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="slot")
        self._thread.start()

    def run(self, number: int, *arguments: Any) -> None:
        """Run a trial; only after SlotReady.

        Args:
            number: of the trial.
            arguments: of `trainer.worker.trial.run_trial`, after the world.
        """
        assert self.group is not None
        # In the thread that calls `stop_trial`, so that no request is lost.
        self.group.stop_requested.clear()
        self.trial = number
        self._jobs.put(arguments)

    def stop_trial(self) -> None:
        """End the trial at its next step, with a checkpoint."""
        if group := self.group:  # its thread may remove it meanwhile
            group.stop_requested.set()

    def close(self) -> None:
        """Accept no more trials. Stops the group unless it runs a trial; the fleet does that."""
        self._closed.set()
        self._jobs.put(None)
        if starting := self._starting:
            starting.stop_requested.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, which may be blocked in a call that does not return."""
        self._thread.join(timeout_s)

    def _work(self) -> None:
        from trainer.worker.trial import run_trial

        done = 0
        while not self._closed.is_set():
            if self.group is None and not self._start_group():
                self._closed.wait(PAUSE_S)
                continue
            self._events.put(SlotReady(self))
            job = self._jobs.get()
            assert self.group is not None
            if job is None:
                self._drop_group()
                return
            error: Exception | None = None
            if not self.group.alive():  # its node may have been lost meanwhile
                self._drop_group()
                self._events.put(TrialRequeued(self))
                continue
            try:
                for message in self.group.run(run_trial, *job):
                    self._events.put(TrialMessage(self, message))
            except Exception as raised:  # after any error the sweep continues
                error = raised
            done += 1
            if (error or done >= self._recycle_after) and not self._closed.is_set():
                self._drop_group()
                done = 0
            self._events.put(TrialEnded(self, error))

    def _start_group(self) -> bool:
        group = self._starting = self._fleet.new_group()
        try:
            if self._closed.is_set():
                return False
            group.start()
        except Exception as error:  # the main thread decides what follows
            group.stop()
            self._events.put(StartFailed(self, error))
            return False
        finally:
            self._starting = None
        self.group = group
        return True

    def _drop_group(self) -> None:
        assert self.group is not None
        self.group.stop()
        self.group = None


class Pool:
    """All slots of a sweep: creates and closes them; the driver gives them trials."""

    def __init__(self, cfg: Config, say: Callable[[str], None]) -> None:
        """Args: say: shows a line to the user."""
        self._cfg, self._say = cfg, say
        self._fleet = Fleet(cfg.cluster, cfg.sweep.slots)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._slots: list[Slot] = []
        self._ready: list[Slot] = []
        self._without_workers: set[Slot] = set()
        self._had_workers: float | None = None  # time at which a slot last had workers; None: never
        self._counted: float | None = None

    def open(self) -> None:
        """Connect to the cluster. Raises as `Fleet.open`."""
        self._fleet.open()

    def close(self) -> None:
        """Close all slots, and disconnect from the cluster."""
        for slot in self._slots:
            slot.close()
        for slot in self._slots:
            if slot.trial is None:  # it may be starting workers, so Ray must not stop yet
                slot.join(SETTLE_S)
        self._fleet.close([slot.group for slot in self._slots if slot.group])
        for slot in self._slots:
            slot.join(1.0)

    @property
    def free(self) -> bool:
        """Whether a slot is ready for a trial."""
        return bool(self._ready)

    @property
    def busy(self) -> bool:
        """Whether a slot has a trial."""
        return any(slot.trial is not None for slot in self._slots)

    def take(self) -> Slot:
        """A slot that is ready for a trial; the caller gives it one."""
        return self._ready.pop(0)

    def stop_trials(self) -> None:
        """End every trial at its next step, with a checkpoint."""
        for slot in self._slots:
            if slot.trial is not None:
                slot.stop_trial()

    def follow_cluster(self) -> None:
        """Every few seconds, create slots that the cluster can hold, and close those it cannot."""
        now = time.monotonic()
        if self._counted is not None and now - self._counted < COUNT_EVERY_S:
            return
        self._counted, size = now, self._fleet.size()
        while len(self._slots) < size:
            self._slots.append(Slot(self._fleet, self._events, self._cfg.sweep.recycle_after))
        for slot in list(self._without_workers)[: len(self._slots) - size]:
            slot.close()
            self._slots.remove(slot)
            self._without_workers.remove(slot)

    def event(self, timeout_s: float) -> TrialMessage | TrialEnded | TrialRequeued | None:
        """The next event of a trial; None: none in this time.

        Raises:
            ConfigError, RunError: no slot can have workers.
        """
        if any(slot.group for slot in self._slots):
            self._had_workers = time.monotonic()
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(event, TrialMessage | TrialEnded | TrialRequeued):
            return event
        if event.slot not in self._slots:
            return None  # closed meanwhile
        if isinstance(event, SlotReady):
            self._without_workers.discard(event.slot)
            self._ready.append(event.slot)
        else:
            self._on_no_workers(event)
        return None

    def _on_no_workers(self, event: StartFailed) -> None:
        if event.slot not in self._without_workers:
            self._say(f"a slot has no workers yet: {first_line(event.error)}")
            self._without_workers.add(event.slot)
        if len(self._without_workers) < len(self._slots):
            return
        if self._had_workers is None:
            raise event.error
        # There were resources before, so the cluster has changed, and may change again.
        limit, waited = self._cfg.cluster.start_timeout_s, time.monotonic() - self._had_workers
        if waited >= limit:
            raise RunError(
                f"no slot has had workers for {waited:.0f} s, which is longer than "
                f"cluster.start_timeout_s={limit:g}: {first_line(event.error)}"
            ) from event.error
