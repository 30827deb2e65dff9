"""Decisions about lost or hanging workers and missing resources: pure, tested without processes."""

from types import SimpleNamespace

import pytest

from trainer.cluster.group import Failure
from trainer.cluster.heartbeat import (
    MAX_POLL_GAP_S,
    POLL_INTERVAL_S,
    HangDetector,
    HeartbeatMonitor,
    HeartbeatStatus,
)
from trainer.cluster.placement import shortage
from trainer.cluster.restart import WorkerLoss, why_not_restart

DIED = WorkerLoss("the process died", None)


def test_losses_lead_to_restarts_until_the_budget_is_used_up():
    assert why_not_restart([DIED], 3) is None
    assert why_not_restart([DIED] * 3, 3) is None
    assert "cluster.max_restarts=3" in why_not_restart([DIED] * 4, 3)
    assert "cluster.max_restarts=0" in why_not_restart([DIED], 0)


def test_the_same_error_at_the_same_step_ends_the_run():
    error = WorkerLoss("ValueError: bad pixel", (0, 17))
    assert why_not_restart([error], 3) is None
    assert "at the same step" in why_not_restart([error, error], 3)
    assert "at the same step" in why_not_restart([error, DIED, error], 3)
    assert why_not_restart([error, WorkerLoss("ValueError: bad pixel", (0, 18))], 3) is None
    assert why_not_restart([error, WorkerLoss("OSError: no route", (0, 17))], 3) is None


def status(beats, busy=False):
    return HeartbeatStatus(beats, busy, (0, beats), f"in phase train, step {beats}")


def test_a_worker_that_makes_progress_does_not_hang():
    detector = HangDetector(1, 10, now=0)
    for second in range(100):
        detector.update(0, status(second), second)
        assert detector.hung_rank(second) is None


def test_missing_heartbeats_and_missing_progress_are_hangs():
    for beats in ([1, 1, 1], []):
        detector = HangDetector(1, 10, now=0)
        for second, beat in enumerate(beats):
            detector.update(0, status(beat), second)
        assert detector.hung_rank(9) is None
        assert detector.hung_rank(11) == 0


def test_the_rank_that_busy_ranks_wait_for_hangs():
    detector = HangDetector(3, 10, now=0)
    for second in range(12):
        detector.update(0, status(4, busy=True), second)
        detector.update(1, status(3), second)
        detector.update(2, status(4, busy=True), second)
    assert detector.hung_rank(11) == 1
    assert detector.last_status(1).position == (0, 3)


def test_time_without_polls_counts_against_no_rank():
    """The driver was suspended or wrote to a slow disk, while the workers may have continued."""
    detector = HangDetector(2, 10, now=0)
    detector.poll(1)
    detector.update(0, status(1), 1)
    detector.poll(100)
    detector.update(0, status(5), 100)  # the answer of rank 1 has not arrived yet
    assert detector.hung_rank(100) is None
    assert detector.last_status(1) is None
    for second in range(101, 112):
        detector.poll(second)
        detector.update(0, status(second), second)
        found = detector.hung_rank(second)
    assert found == 1


def test_a_finished_rank_does_not_hang():
    detector = HangDetector(2, 10, now=0)
    detector.finish(1)
    for second in range(30):
        detector.poll(second)
        detector.update(0, status(second), second)
        assert detector.hung_rank(second) is None
    detector.finish(0)
    assert detector.hung_rank(100) is None


def test_polls_at_short_intervals_extend_no_timeout():
    detector = HangDetector(1, 10, now=0)
    now = 0.0
    while detector.hung_rank(now) is None:
        now += MAX_POLL_GAP_S
        detector.poll(now)
        assert now < 20
    assert now <= 10 + MAX_POLL_GAP_S


class Busy:
    """An actor whose every heartbeat shows progress; its references hold the answers."""

    def __init__(self):
        self.beats = 0

    @property
    def heartbeat(self):
        return self

    def remote(self):
        self.beats += 1
        return object(), status(self.beats)


def test_every_poll_collects_the_heartbeats_of_all_ranks(monkeypatch):
    """With many ranks, one heartbeat per poll would exceed the time-out."""
    now = [0.0]
    fake_ray = SimpleNamespace(
        get=lambda ref: ref[1],
        wait=lambda refs, num_returns=1, timeout=None: (refs[:num_returns], refs[num_returns:]),
    )
    monkeypatch.setattr("trainer.cluster.heartbeat.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("trainer.cluster.heartbeat.ray", fake_ray)
    monitor = HeartbeatMonitor([Busy() for _ in range(100)], 5)
    while now[0] < 20:
        assert monitor.poll() is None
        now[0] += POLL_INTERVAL_S
    assert monitor.last_status(99).beats > 10


@pytest.mark.parametrize(
    ("device", "failure", "unusable"),
    [
        ("cuda", Failure("RuntimeError: device-side assert", ""), True),
        ("cuda", Failure("rank 1 went away", "", is_peer_loss=True), False),
        ("cuda", Failure("the loss is nan", "", is_permanent=True), False),
        ("cuda", Failure("data.root", "", is_config_error=True), False),
        ("cpu", Failure("RuntimeError: shapes", ""), False),
    ],
)
def test_a_worker_is_not_reused_after_an_error_on_a_gpu(device, failure, unusable):
    assert failure.makes_worker_unusable(device) == unusable


@pytest.mark.parametrize(
    ("bundle", "workers", "nodes", "free", "expected", "permanent"),
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
def test_the_missing_resources_are_named(bundle, workers, nodes, free, expected, permanent):
    missing, is_permanent = shortage(bundle, workers, nodes, free)
    assert is_permanent == permanent
    for part in expected:
        assert part in missing
