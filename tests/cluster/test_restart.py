"""Decisions about workers that are lost, hang or find no room: pure, tested without processes."""

from types import SimpleNamespace

import pytest

from trainer.cluster.group import Failure
from trainer.cluster.placement import shortage
from trainer.cluster.restart import Loss, why_not_restart
from trainer.cluster.signs import LOOK_EVERY_S, Signs
from trainer.cluster.watch import AWAY_S, Sign, Watch

DIED = Loss("the process died", None)


def test_accidents_are_forgiven_until_the_budget_is_used_up():
    assert why_not_restart([DIED], 3) is None
    assert why_not_restart([DIED] * 3, 3) is None
    assert "cluster.max_restarts=3" in why_not_restart([DIED] * 4, 3)
    assert "cluster.max_restarts=0" in why_not_restart([DIED], 0)


def test_the_same_error_at_the_same_step_is_no_accident():
    error = Loss("ValueError: bad pixel", (0, 17))
    assert why_not_restart([error], 3) is None
    assert "same step" in why_not_restart([error, error], 3)
    assert "same step" in why_not_restart([error, DIED, error], 3)
    assert why_not_restart([error, Loss("ValueError: bad pixel", (0, 18))], 3) is None
    assert why_not_restart([error, Loss("OSError: no route", (0, 17))], 3) is None


def sign(beats, waiting=False):
    return Sign(beats, waiting, (0, beats), f"in phase train, step {beats}")


def test_a_worker_that_moves_does_not_hang():
    watch = Watch(1, 10, now=0)
    for second in range(100):
        watch.heard(0, sign(second), second)
        assert watch.hung(second) is None


def test_silence_and_standstill_are_hangs():
    for beats in ([1, 1, 1], []):
        watch = Watch(1, 10, now=0)
        for second, beat in enumerate(beats):
            watch.heard(0, sign(beat), second)
        assert watch.hung(9) is None
        assert watch.hung(11) == 0


def test_the_one_that_others_wait_for_hangs():
    watch = Watch(3, 10, now=0)
    for second in range(12):
        watch.heard(0, sign(4, waiting=True), second)
        watch.heard(1, sign(3), second)
        watch.heard(2, sign(4, waiting=True), second)
    assert watch.hung(11) == 1
    assert watch.last(1).place == (0, 3)


def test_the_time_in_which_nobody_looked_is_held_against_no_one():
    """The driver was stopped, or wrote to a slow disk: workers went on, or nobody knows."""
    watch = Watch(2, 10, now=0)
    watch.look(1)
    watch.heard(0, sign(1), 1)
    watch.look(100)
    watch.heard(0, sign(5), 100)  # the other one's answer is still on its way
    assert watch.hung(100) is None
    assert watch.last(1) is None
    for second in range(101, 112):
        watch.look(second)
        watch.heard(0, sign(second), second)
        found = watch.hung(second)
    assert found == 1


def test_who_has_nothing_more_to_do_does_not_hang():
    watch = Watch(2, 10, now=0)
    watch.ended(1)
    for second in range(30):
        watch.look(second)
        watch.heard(0, sign(second), second)
        assert watch.hung(second) is None
    watch.ended(0)
    assert watch.hung(100) is None


def test_looks_at_short_intervals_forgive_nothing():
    watch = Watch(1, 10, now=0)
    now = 0.0
    while watch.hung(now) is None:
        now += AWAY_S
        watch.look(now)
        assert now < 20
    assert now <= 10 + AWAY_S


class Busy:
    """An actor that has done something whenever it is asked; what it is asked for is the answer."""

    def __init__(self):
        self.beats = 0

    @property
    def sign(self):
        return self

    def remote(self):
        self.beats += 1
        return object(), sign(self.beats)


def test_every_look_takes_in_the_signs_of_all_ranks(monkeypatch):
    """With many of them, one sign a look would not come round in time."""
    now = [0.0]
    fake_ray = SimpleNamespace(
        get=lambda ref: ref[1],
        wait=lambda refs, num_returns=1, timeout=None: (refs[:num_returns], refs[num_returns:]),
    )
    monkeypatch.setattr("trainer.cluster.signs.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("trainer.cluster.signs.ray", fake_ray)
    signs = Signs([Busy() for _ in range(100)], 5)
    while now[0] < 20:
        assert signs.look() is None
        now[0] += LOOK_EVERY_S
    assert signs.last(99).beats > 10


@pytest.mark.parametrize(
    ("device", "failure", "spoils"),
    [
        ("cuda", Failure("RuntimeError: device-side assert", ""), True),
        ("cuda", Failure("rank 1 went away", "", peer=True), False),
        ("cuda", Failure("the loss is nan", "", final=True), False),
        ("cuda", Failure("data.root", "", wrong_config=True), False),
        ("cpu", Failure("RuntimeError: shapes", ""), False),
    ],
)
def test_after_an_error_on_a_gpu_a_worker_is_not_kept(device, failure, spoils):
    assert failure.spoils(device) == spoils


@pytest.mark.parametrize(
    ("bundle", "workers", "nodes", "free", "said", "forever"),
    [
        ({"CPU": 2}, 2, [{"CPU": 4}], {"CPU": 1}, ["4 CPU needed, 1 of 4 free"], False),
        ({"CPU": 2}, 3, [{"CPU": 4}], {"CPU": 4}, ["6 CPU needed, 4 of 4 free"], True),
        ({"CPU": 8}, 2, [{"CPU": 4}] * 4, {"CPU": 16},
         ["16 CPU needed, 16 of 16 free", "each worker needs 8 CPU of one node", "only 0"], True),
        ({"CPU": 6}, 5, [{"CPU": 16}] * 2, {"CPU": 32}, ["only 4 find that"], True),
        ({"CPU": 1, "GPU": 1}, 1, [{"CPU": 8}, {"GPU": 8}], {}, ["1 CPU and 1 GPU of one"], True),
        ({"CPU": 0.25}, 2, [{"CPU": 1}], {}, ["0.5 CPU needed, 0 of 1 free"], False),
    ],
)  # fmt: skip
def test_why_workers_find_no_room(bundle, workers, nodes, free, said, forever):
    missing, never = shortage(bundle, workers, nodes, free)
    assert never == forever
    for part in said:
        assert part in missing
