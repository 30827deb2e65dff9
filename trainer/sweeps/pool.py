"""The slots of a sweep, each of which runs one trial at a time on its own warm workers.

The driver's main thread waits for the messages of all slots at once. A slot has a thread only while
its workers start, while a failure is examined, and while this process is itself the worker. There
are as many slots as the cluster can hold, while nodes join and leave.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trainer.cluster import Fleet, Step, WorkerFailed, WorkerGroup
from trainer.config import Config
from trainer.errors import RunError, first_line

PAUSE_S = 5.0  # pause before the next attempt to start a slot's workers
COUNT_EVERY_S = 5.0  # interval of checks of the cluster's size
THREADS_S = 0.05  # largest wait for messages while threads of slots may report something, too
MIN_STEP_S = 0.5  # interval at which a group asks for heartbeats: more steps would find nothing new
MAX_STEP_S = 1.0  # largest interval of steps without messages, which look at heartbeats
# Slots whose workers start at the same time. Each costs this process a thread, and Ray's head a
# pending reservation, which would be thousands on a large cluster. The value is a choice, not
# measured: another slot starts as soon as one has workers, so it only limits how fast they start.
MAX_STARTING = 64
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
        self.stepped = 0.0  # time of the last step
        self._trials = 0  # of the present workers
        self._steps: Iterator[Any] | None = None  # of the trial, unless a thread follows it
        self._closed = threading.Event()
        self._lock = threading.Lock()  # held while it is closed, and while it gets workers
        self._starting: WorkerGroup | None = None
        self._in_background(self._start_group)

    def run(self, number: int, *arguments: Any) -> None:
        """Run a trial; only after SlotReady.

        Args:
            number: of the trial.
            arguments: of `trainer.worker.trial.run_trial`, after the world.
        """
        from trainer.worker.trial import run_trial

        assert self.group is not None
        self.group.stop_requested.clear()
        self.trial = number
        self._follow(self.group.steps(run_trial, *arguments))

    @property
    def waits(self) -> bool:
        """Whether the trial waits for `step`."""
        return self._steps is not None

    def step(self) -> None:
        """Report what has happened in the trial since the last call. Does not wait."""
        if self._steps is not None:
            self._follow(self._steps)

    def stop_trial(self) -> None:
        """End the trial at its next step, with a checkpoint. Further calls do nothing."""
        group = self.group  # a thread may remove it meanwhile
        if group and not group.stop_requested.is_set():
            group.stop_requested.set()
            self.step()

    def close(self) -> None:
        """Accept no more trials, and stop workers that start, in their thread.

        From now on `group` does not change while the slot has no trial: the caller stops it.
        """
        with self._lock:
            self._closed.set()
        self._steps = None
        if starting := self._starting:
            starting.stop_requested.set()

    def stop_workers(self) -> None:
        """Stop the workers of a closed slot without a trial, if they were up when it was closed."""
        if self.group is not None:
            self.group.stop()
            self.group = None

    @property
    def has_thread(self) -> bool:
        """Whether a thread of the slot may still report something."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait for the slot's thread, which may be blocked in a call that does not return."""
        self._thread.join(timeout_s)

    def _in_background(self, function: Callable[..., None], *args: Any) -> None:
        self._thread = threading.Thread(target=function, args=args, daemon=True, name="slot")
        self._thread.start()

    def _follow(self, steps: Iterator[Any], may_block: bool = False) -> None:
        """Report the steps of the trial until it waits or ends.

        Args:
            steps: of the trial.
            may_block: whether this is a thread of the slot.
        """
        error: Exception | None = None
        self.stepped = time.monotonic()
        try:
            for step in steps:
                if step is Step.WAIT:
                    self._steps = steps
                    return
                if step is Step.BLOCK and not may_block:
                    self._steps = None
                    self._in_background(self._follow, steps, True)
                    return
                if not isinstance(step, Step):
                    self._events.put(TrialMessage(self, step))
        except Exception as raised:  # after any error the sweep continues
            error = raised
        self._steps = None
        self._trials += 1
        lost = isinstance(error, WorkerFailed) and not error.had_begun
        ended = TrialRequeued(self) if lost else TrialEnded(self, error)
        if self._closed.is_set():
            self._events.put(ended)
        elif not error and self._trials < self._recycle_after:
            self._events.put(ended)
            self._events.put(SlotReady(self))
        elif may_block:
            self._replace_group(ended)
        else:
            self._in_background(self._replace_group, ended)

    def _replace_group(self, ended: Event) -> None:
        assert self.group is not None
        self.group.stop()
        self.group = None
        self._events.put(ended)
        self._start_group()

    def _start_group(self) -> None:
        """Start workers; try again after a pause until it succeeds or the slot is closed."""
        while not self._closed.is_set():
            group = self._starting = self._fleet.new_group()
            try:
                if self._closed.is_set():  # before `close` could see this group
                    return
                group.start()
            except Exception as error:  # the main thread decides what follows
                group.stop()
                self._events.put(StartFailed(self, error))
                self._closed.wait(PAUSE_S)
                continue
            finally:
                self._starting = None
            with self._lock:
                if not self._closed.is_set():
                    self.group, self._trials = group, 0
                    self._events.put(SlotReady(self))
                    return
            group.stop()


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
        self._size = 0  # number of slots that there should be
        self._step_every_s = step_interval(cfg.cluster.hang_timeout_s)

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
        self._counted, self._size = now, self._fleet.size()
        self._add_slots()
        for slot in list(self._without_workers)[: max(0, len(self._slots) - self._size)]:
            slot.close()
            slot.stop_workers()  # SlotReady may be among the events
            self._slots.remove(slot)
            self._without_workers.remove(slot)

    def _add_slots(self) -> None:
        starting = sum(slot.group is None for slot in self._slots)
        for _ in range(min(self._size - len(self._slots), MAX_STARTING - starting)):
            self._slots.append(Slot(self._fleet, self._events, self._cfg.sweep.recycle_after))

    def event(self, timeout_s: float) -> TrialMessage | TrialEnded | TrialRequeued | None:
        """The next event of a trial; None: none in this time.

        Raises:
            ConfigError, RunError: no slot can have workers.
        """
        if any(slot.group for slot in self._slots):
            self._had_workers = time.monotonic()
        # Ask for threads first: what those that have ended reported is among the events.
        limit_s = THREADS_S if any(slot.has_thread for slot in self._slots) else timeout_s
        if self._events.empty() and self._step_trials(min(timeout_s, limit_s)):
            timeout_s = 0
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
            self._add_slots()
        else:
            self._on_no_workers(event)
        return None

    def _step_trials(self, timeout_s: float) -> bool:
        """Wait for messages of the trials, and report them. False: there is nothing to wait for."""
        waiting = {slot.group: slot for slot in self._slots if slot.waits and slot.group}
        if not waiting:
            return False
        found = self._fleet.wait(waiting, timeout_s)
        since = time.monotonic() - self._step_every_s
        due = [group for group, slot in waiting.items() if slot.stepped <= since]
        for group in dict.fromkeys([*found, *due]):
            waiting[group].step()
        return True

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


def step_interval(hang_timeout_s: float) -> float:
    """The largest interval of steps of a trial without messages, in seconds.

    Args:
        hang_timeout_s: the time after which a worker without progress counts as hung, in seconds.
    """
    return max(MIN_STEP_S, min(MAX_STEP_S, hang_timeout_s / 60))
