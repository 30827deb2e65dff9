"""Slots: each a warm group of workers and a thread of the driver that feeds it.

Slots tell the driver's main thread all that happens as events in one queue, and decide nothing
themselves but when their workers are replaced: after an error, and after so many trials.
"""

import queue
import threading
from dataclasses import dataclass
from typing import Any

from trainer.cluster import Fleet, WorkerGroup

PAUSE_S = 5.0  # before a group that found no room is tried again


@dataclass(frozen=True)
class Ready:
    """The slot waits for a trial."""

    slot: "Slot"


@dataclass(frozen=True)
class NoWorkers:
    """The slot's workers did not start; it tries again."""

    slot: "Slot"
    error: Exception


@dataclass(frozen=True)
class Said:
    """A message of the slot's trial."""

    slot: "Slot"
    message: Any


@dataclass(frozen=True)
class Ended:
    """The slot's trial has ended; `error` is why it failed, if it did."""

    slot: "Slot"
    error: Exception | None


@dataclass(frozen=True)
class GivenBack:
    """The slot's trial did not begin: the workers were gone. The slot gets new ones."""

    slot: "Slot"


Event = Ready | NoWorkers | Said | Ended | GivenBack


class Slot:
    """One trial at a time, on warm workers. All methods are for the main thread."""

    def __init__(
        self, fleet: Fleet, events: "queue.SimpleQueue[Event]", recycle_after: int
    ) -> None:
        self.trial: int | None = None  # number of the one that it runs
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
        """Run a trial; only after Ready.

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
        """Let the trial end at its next step, with a checkpoint."""
        if group := self.group:  # its thread may take it away meanwhile
            group.stop_requested.set()

    def close(self) -> None:
        """Take no more trials; the group ends, unless it is amid one: the fleet stops it then."""
        self._closed.set()
        self._jobs.put(None)
        if starting := self._starting:
            starting.stop_requested.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, which may be stuck in a call that nothing ends."""
        self._thread.join(timeout_s)

    def _work(self) -> None:
        from trainer.worker.trial import run_trial

        done = 0
        while not self._closed.is_set():
            if self.group is None and not self._start_group():
                self._closed.wait(PAUSE_S)
                continue
            self._events.put(Ready(self))
            job = self._jobs.get()
            assert self.group is not None
            if job is None:
                self._drop_group()
                return
            error: Exception | None = None
            if not self.group.alive():  # its node may have gone while it waited
                self._drop_group()
                self._events.put(GivenBack(self))
                continue
            try:
                for message in self.group.run(run_trial, *job):
                    self._events.put(Said(self, message))
            except Exception as raised:  # whatever it is, the sweep goes on
                error = raised
            done += 1
            if (error or done >= self._recycle_after) and not self._closed.is_set():
                self._drop_group()
                done = 0
            self._events.put(Ended(self, error))

    def _start_group(self) -> bool:
        group = self._starting = self._fleet.new_group()
        try:
            if self._closed.is_set():
                return False
            group.start()
        except Exception as error:  # no room now, or none ever: the main thread judges
            group.stop()
            self._events.put(NoWorkers(self, error))
            return False
        finally:
            self._starting = None
        self.group = group
        return True

    def _drop_group(self) -> None:
        assert self.group is not None
        self.group.stop()
        self.group = None
