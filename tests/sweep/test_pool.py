"""Slots and their workers, with groups that start as the test says."""

import threading
import time

import pytest

from trainer.config import Config, typed
from trainer.errors import ConfigError, RunError
from trainer.sweep import pool as pools
from trainer.sweep import slots
from trainer.sweep.slots import Ended, GivenBack

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

    def open(self): ...

    def size(self):
        return max(1, self.room)

    def new_group(self):
        return Group(self)

    def close(self, groups): ...


class Group:
    def __init__(self, nodes):
        self.nodes = nodes
        self.stop_asked = threading.Event()

    def start(self):
        if self.nodes.room == 0:
            raise ConfigError("no room")

    def alive(self):
        return not self.nodes.lost

    def run(self, body, *args):
        yield from ()

    def stop(self): ...


@pytest.fixture
def made(monkeypatch):
    """A pool on `nodes`, whose clocks run fast."""
    nodes = Nodes(room=2)
    monkeypatch.setattr(pools, "Fleet", lambda cfg, groups: nodes)
    monkeypatch.setattr(pools, "COUNT_EVERY_S", 0)
    monkeypatch.setattr(slots, "PAUSE_S", 0.005)
    pool = pools.Pool(typed(Config, CFG), lambda line: None)
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
    assert isinstance(event, GivenBack)
    nodes.lost = False
    until(pool, lambda _: len(pool._ready) == 2)
    pool.take().run(0, None, None)
    (event,) = until(pool, lambda events: events)
    assert event == Ended(event.slot, None)


def test_where_no_slot_ever_had_workers_their_error_is_raised_at_once(made):
    pool, nodes = made
    nodes.room = 0
    with pytest.raises(ConfigError, match="no room"):
        until(pool, lambda _: False)


def test_where_all_workers_are_lost_there_is_a_wait_for_room_before_the_error(made):
    pool, nodes = made
    until(pool, lambda _: len(pool._ready) == 2)
    nodes.room, nodes.lost = 0, True
    for _ in range(2):
        pool.take().run(0, None, None)
    begun = time.monotonic()
    with pytest.raises(RunError, match=r"cluster\.start_timeout_s=0\.1: no room"):
        until(pool, lambda _: False)
    assert time.monotonic() - begun >= 0.1
