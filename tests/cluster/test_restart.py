"""Restart decisions and hang detection: pure, so tested without processes."""

from trainer.cluster.restart import Loss, why_not_restart
from trainer.cluster.watch import Sign, Watch

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
    return Sign(beats, waiting, (0, beats))


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
    assert watch.place(1) == (0, 3)
