"""The slots of a sweep: as many as the cluster has room for, while nodes come and go."""

import queue
import time
from collections.abc import Callable

from trainer.cluster import Fleet
from trainer.config import Config
from trainer.errors import RunError, first_line
from trainer.sweeps.slots import Ended, Event, GivenBack, NoWorkers, Ready, Said, Slot

COUNT_EVERY_S = 5.0  # between two looks at the size of the cluster
SETTLE_S = 5.0  # how long a slot that runs no trial may take to end


class Pool:
    """Slots that are made, waited for and given up; the driver gives them trials."""

    def __init__(self, cfg: Config, say: Callable[[str], None]) -> None:
        """Args: say: tells the user a line."""
        self._cfg, self._say = cfg, say
        self._fleet = Fleet(cfg.cluster, cfg.sweep.slots)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._slots: list[Slot] = []
        self._ready: list[Slot] = []
        self._without_workers: set[Slot] = set()
        self._had_workers: float | None = None  # when; None: not yet
        self._counted: float | None = None

    def open(self) -> None:
        """Connect to the cluster. Raises as `Fleet.open`."""
        self._fleet.open()

    def close(self) -> None:
        """End all slots, and disconnect."""
        for slot in self._slots:
            slot.close()
        for slot in self._slots:
            if slot.trial is None:  # it may be starting workers: not while Ray goes away
                slot.join(SETTLE_S)
        self._fleet.close([slot.group for slot in self._slots if slot.group])
        for slot in self._slots:
            slot.join(1.0)

    @property
    def free(self) -> bool:
        """Whether a slot waits for a trial."""
        return bool(self._ready)

    @property
    def busy(self) -> bool:
        """Whether a slot has a trial."""
        return any(slot.trial is not None for slot in self._slots)

    def take(self) -> Slot:
        """A slot that waits for a trial, to give it one."""
        return self._ready.pop(0)

    def stop_trials(self) -> None:
        """Let every trial end at its next step, with a checkpoint."""
        for slot in self._slots:
            if slot.trial is not None:
                slot.stop_trial()

    def follow_cluster(self) -> None:
        """Now and then, make slots for which there is room, and give up those for which not."""
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

    def event(self, timeout_s: float) -> Said | Ended | GivenBack | None:
        """The next thing that a trial's slot tells; None: nothing in this time.

        Raises:
            ConfigError, RunError: no slot can have workers.
        """
        if any(slot.group for slot in self._slots):
            self._had_workers = time.monotonic()
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(event, Said | Ended | GivenBack):
            return event
        if event.slot not in self._slots:
            return None  # given up meanwhile
        if isinstance(event, Ready):
            self._without_workers.discard(event.slot)
            self._ready.append(event.slot)
        else:
            self._on_no_workers(event)
        return None

    def _on_no_workers(self, event: NoWorkers) -> None:
        if event.slot not in self._without_workers:
            self._say(f"a slot has no workers yet: {first_line(event.error)}")
            self._without_workers.add(event.slot)
        if len(self._without_workers) < len(self._slots):
            return
        if self._had_workers is None:
            raise event.error
        # There was room before, so it is the cluster that has changed, and may again.
        limit, waited = self._cfg.cluster.start_timeout_s, time.monotonic() - self._had_workers
        if waited >= limit:
            raise RunError(
                f"no slot has had workers for {waited:.0f} s, which is longer than "
                f"cluster.start_timeout_s={limit:g}: {first_line(event.error)}"
            ) from event.error
