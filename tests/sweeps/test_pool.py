"""Slots and their workers, with fake groups that the tests control."""

import queue
import threading
import time

import pytest

from trainer.cluster import Step, WorkerFailed
from trainer.config import Config, to_dataclass
from trainer.errors import ConfigError, RunError
from trainer.sweeps import pool as pools
from trainer.sweeps.pool import TrialEnded, TrialMessage, TrialRequeued

CFG = {
    "name": "n",
    "model": {},
    "data": {"batch_size": 8},
    "optimizer": {},
    "phases": {},
    "cluster": {"workers": 1, "start_timeout_s": 0.1},
}


class Nodes:
    """In the place of a fleet: has room for so many groups, all of which are lost at once."""

    def __init__(self, room):
        self.room = room
        self.lost = False
        self.started = self.stopped = 0  # groups
        self.opening = threading.Event()  # they start when it is set
        self.opening.set()

    def open(self): ...

    def size(self):
        return max(1, self.room)

    def new_group(self):
        return Group(self)

    def wait(self, groups, timeout_s):
        return list(groups)

    def close(self, groups): ...


class Group:
    def __init__(self, nodes):
        self.nodes = nodes
        self.stop_requested = threading.Event()
        self.stopped = False

    def start(self):
        self.nodes.opening.wait()
        if self.nodes.room == 0:
            raise ConfigError("no room")
        self.nodes.started += 1

    def steps(self, body, cfg, start):
        yield Step.WAIT
        if self.nodes.lost:
            error = WorkerFailed(0, "host", "lost", "")
            error.had_begun = False
            raise error
        if start is not None:
            start(self)

    def stop(self):
        self.nodes.stopped += 1


@pytest.fixture
def made(monkeypatch):
    """A pool on `nodes`, whose clocks run fast."""
    nodes = Nodes(room=2)
    monkeypatch.setattr(pools, "Fleet", lambda cfg, groups: nodes)
    monkeypatch.setattr(pools, "COUNT_EVERY_S", 0)
    monkeypatch.setattr(pools, "PAUSE_S", 0.005)
    cfg = to_dataclass(Config, {**CFG, "sweep": {"recycle_after": 3}})
    pool = pools.Pool(cfg, lambda line: None)
    yield pool, nodes
    pool.close()


def until(pool, done):
    """Go on until `done` says so. Returns the events on the way."""
    events = []
    deadline = time.monotonic() + 5
    while not done(events):
        assert time.monotonic() < deadline
        pool.follow_cluster()
        if event := pool.event(0.01):
            event.slot.trial = None
            events.append(event)
    return events


def test_slots_come_and_go_with_the_nodes(made):
    pool, nodes = made
    until(pool, lambda _: len(pool._ready) == 2)
    nodes.room = 3
    until(pool, lambda _: len(pool._ready) == 3)
    for _ in range(3):
        pool.take().run(0, None, None)
    nodes.room, nodes.lost = 0, True
    until(pool, lambda events: len(events) == 3 and len(pool._slots) == 1)
    nodes.room, nodes.lost = 2, False
    until(pool, lambda _: len(pool._ready) == 2)


def test_a_trial_whose_workers_are_gone_before_it_began_is_given_back(made):
    pool, nodes = made
    until(pool, lambda _: pool.free)
    nodes.lost = True
    pool.take().run(0, None, None)
    (event,) = until(pool, lambda events: events)
    assert isinstance(event, TrialRequeued)
    nodes.lost = False
    until(pool, lambda _: len(pool._ready) == 2)
    pool.take().run(0, None, None)
    (event,) = until(pool, lambda events: events)
    assert event == TrialEnded(event.slot, None)


def test_where_no_slot_ever_had_workers_their_error_is_raised_at_once(made):
    pool, nodes = made
    nodes.room = 0
    with pytest.raises(ConfigError, match="no room"):
        until(pool, lambda _: False)


def test_after_the_loss_of_all_workers_the_error_comes_after_a_wait(made):
    pool, nodes = made
    until(pool, lambda _: len(pool._ready) == 2)
    nodes.room, nodes.lost = 0, True
    for _ in range(2):
        pool.take().run(0, None, None)
    begun = time.monotonic()
    with pytest.raises(RunError, match=r"cluster\.start_timeout_s=0\.1: no room"):
        until(pool, lambda _: False)
    assert time.monotonic() - begun >= 0.1


def test_workers_stay_warm_and_are_recycled_after_some_trials_and_after_an_error(made):
    pool, nodes = made
    nodes.room = 1

    def one_trial(start):
        until(pool, lambda _: pool.free)
        pool.take().run(0, None, start)
        (event,) = until(pool, lambda events: events)
        return event.error

    started = []
    for _ in range(7):
        assert one_trial(lambda group: started.append(nodes.started)) is None
    assert started == [1, 1, 1, 2, 2, 2, 3]

    def fail(group):
        raise ArithmeticError

    assert isinstance(one_trial(fail), ArithmeticError)
    assert one_trial(lambda group: started.append(nodes.started)) is None
    assert started[-1] == 4


def test_a_trial_receives_a_stop_request_that_arrives_before_its_first_message(made):
    pool, _ = made
    heard = []
    until(pool, lambda _: pool.free)
    slot = pool.take()
    slot.group.stop_requested.set()  # by the trial before
    slot.run(0, None, lambda group: heard.append(group.stop_requested.is_set()))
    assert not slot.group.stop_requested.is_set()
    pool.stop_trials()
    until(pool, lambda events: events)
    assert heard == [True]


class Streaming(Group):
    """Its trials send what the test puts into `news`, and end with None."""

    def steps(self, body, cfg, news):
        while True:
            while not news:
                yield Step.WAIT
            if (message := news.pop(0)) is None:
                return
            yield message


def test_one_thread_follows_the_messages_of_all_slots(made, monkeypatch):
    pool, nodes = made
    nodes.room = 50
    monkeypatch.setattr(nodes, "new_group", lambda: Streaming(nodes))
    monkeypatch.setattr(nodes, "wait", lambda groups, timeout_s: [g for g in groups if g in due])
    monkeypatch.setattr(pool, "_step_every_s", 1000)
    due, feeds = [], []
    until(pool, lambda _: len(pool._ready) == 50)
    for slot in pool._slots:
        slot.join(5)
    for number in range(50):
        feeds.append([])
        slot = pool.take()
        slot.run(number, None, feeds[-1])
        due.append(slot.group)
    assert not any(slot._thread.is_alive() for slot in pool._slots)
    for number, feed in enumerate(feeds):
        feed += [("epoch", number), None]
    heard, ended = set(), set()
    while len(ended) < 50:
        event = pool.event(0)
        if isinstance(event, TrialMessage):
            heard.add((event.slot.trial, event.message))
        elif event:
            ended.add(event.slot.trial)
            event.slot.trial = None
    assert heard == {(number, ("epoch", number)) for number in range(50)}
    assert ended == set(range(50))
    assert not any(slot._thread.is_alive() for slot in pool._slots)


def test_a_step_that_blocks_is_left_to_a_thread(made, monkeypatch):
    """The inline group trains in a thread; the end of a failed run is examined in one."""
    pool, nodes = made
    nodes.room = 1
    where = []

    class Blocking(Group):
        def steps(self, *_):
            where.append(threading.current_thread().name)
            yield Step.BLOCK
            where.append(threading.current_thread().name)
            raise ArithmeticError

    monkeypatch.setattr(nodes, "new_group", lambda: Blocking(nodes))
    until(pool, lambda _: pool.free)
    pool.take().run(0, None)
    (event,) = until(pool, lambda events: events)
    assert isinstance(event.error, ArithmeticError)
    assert where == [threading.current_thread().name, "slot"]


def test_a_second_request_to_stop_a_trial_does_nothing(made, monkeypatch):
    """The search repeats it for as long as it stops."""
    pool, nodes = made
    nodes.room = 1
    steps = []

    class Counting(Group):
        def steps(self, *_):
            while len(steps) < 3:
                steps.append(self.stop_requested.is_set())
                yield Step.WAIT

    monkeypatch.setattr(nodes, "new_group", lambda: Counting(nodes))
    until(pool, lambda _: pool.free)
    pool.take().run(0, None)
    for _ in range(5):
        pool.stop_trials()
    assert steps == [False, True]
    until(pool, lambda events: events)
    until(pool, lambda _: pool.free)
    steps.clear()
    pool.take().run(1, None)  # the next trial can be stopped, too
    for _ in range(5):
        pool.stop_trials()
    assert steps == [False, True]
    until(pool, lambda events: events)


def test_a_wait_for_messages_is_short_while_a_thread_may_report(made, monkeypatch):
    pool, nodes = made
    waits = []
    until(pool, lambda _: len(pool._ready) == 2)

    def wait(groups, timeout_s):
        waits.append(timeout_s)
        return []

    monkeypatch.setattr(nodes, "wait", wait)
    pool.take().run(0, None, None)
    for slot in pool._slots:
        slot.join(5)
    pool.event(0.25)
    nodes.opening.clear()
    nodes.room = 3
    pool.follow_cluster()  # the third slot starts
    pool.event(0.25)
    pool.event(0)
    assert waits == [0.25, pools.THREADS_S, 0]
    nodes.opening.set()


@pytest.mark.parametrize(
    ("hang_timeout_s", "interval_s"), [(5, 0.5), (30, 0.5), (45, 0.75), (60, 1), (600, 1)]
)
def test_trials_are_stepped_as_often_as_heartbeats_are_needed(hang_timeout_s, interval_s):
    assert pools.step_interval(hang_timeout_s) == interval_s


def test_workers_that_are_up_when_their_slot_is_closed_are_stopped(made):
    """The slot had none for a while, and that it has some now is still among the events."""
    pool, nodes = made
    nodes.opening.clear()
    pool.follow_cluster()
    slot, other = pool._slots
    pool._without_workers.add(slot)
    nodes.opening.set()
    for each in (slot, other):
        each.join(5)
    nodes.room = 1
    pool.follow_cluster()
    assert pool._slots == [other]
    until(pool, lambda _: pool._ready == [other])
    assert (nodes.started, nodes.stopped) == (2, 1)


def test_a_slot_that_is_closed_before_its_workers_start_starts_none():
    nodes = Nodes(room=1)
    requested, closed = threading.Event(), threading.Event()

    def new_group():
        requested.set()
        assert closed.wait(5)
        return Group(nodes)

    nodes.new_group = new_group
    slot = pools.Slot(nodes, queue.SimpleQueue(), 3)
    assert requested.wait(5)
    slot.close()
    closed.set()
    slot.join(5)
    assert (nodes.started, slot.group) == (0, None)


def test_workers_that_start_while_their_slot_is_closed_end_with_it(made):
    pool, nodes = made
    nodes.room = 1
    nodes.opening.clear()
    pool.follow_cluster()
    (slot,) = pool._slots
    while slot._starting is None:
        time.sleep(0.001)
    slot.close()
    nodes.opening.set()
    slot.join(5)
    assert (nodes.started, nodes.stopped) == (1, 1)
