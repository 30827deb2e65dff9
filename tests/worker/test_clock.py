"""The clock of a phase: waiting for data."""

import time
from types import SimpleNamespace

import pytest

from trainer.worker import clock as clocks
from trainer.worker.clock import PhaseClock

STEP = SimpleNamespace(loss=1.0, targets=4, samples=4, applied=True)


def test_the_share_of_waiting_counts_this_phase_alone_and_continues_after_a_resume(monkeypatch):
    now, waited = [100.0], [7.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = PhaseClock(now[0], lambda: waited[0])
    assert clock.data_wait() is None
    clock.count(STEP)
    now[0], waited[0] = 120.0, 10.0
    clock.end_epoch(now[0])
    assert clock.data_wait() == pytest.approx(3 / 20)
    resumed = PhaseClock(now[0], lambda: 0.5)
    resumed.load(clock.state())
    assert resumed.data_wait() == pytest.approx(3 / 20)
    assert "in 15% of the training time" in resumed.data_notice()
    monkeypatch.setattr(clocks, "WAIT_SHARE", 0.2)
    assert clock.data_notice() == ""
