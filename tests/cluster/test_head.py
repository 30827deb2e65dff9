"""The monitor of a cluster's head node, with a socket in the place of the head."""

import socket
import time

import pytest

from trainer.cluster import head
from trainer.cluster.head import HeadMonitor
from trainer.messages import HeadLost, HeadRecovered


@pytest.fixture(autouse=True)
def _short_times(monkeypatch):
    monkeypatch.setattr(head, "PROBE_INTERVAL_S", 0.01)
    monkeypatch.setattr(head, "LOST_AFTER_S", 0.1)
    monkeypatch.setattr(head, "RETRY_S", 0.01)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_head_that_disappears_and_returns():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    monitor = HeadMonitor(f"127.0.0.1:{port}")
    assert monitor.answers()
    assert monitor.wait_until_known()
    assert not monitor.lost
    assert monitor.message() == HeadRecovered(f"127.0.0.1:{port}")
    before = time.monotonic()
    listener.close()
    wait_for(lambda: monitor.lost)
    assert not monitor.answers()
    assert not monitor.wait_until_known()
    message = monitor.message()
    assert isinstance(message, HeadLost)
    assert before < message.deadline - head.STOP_AFTER_S < time.monotonic()
    with socket.create_server(("127.0.0.1", port)):
        wait_for(lambda: not monitor.lost)
    monitor.stop()


def test_a_short_restart_of_the_head_is_not_a_loss(monkeypatch):
    monkeypatch.setattr(head, "LOST_AFTER_S", 10)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    monitor = HeadMonitor(f"127.0.0.1:{port}")
    wait_for(lambda: isinstance(monitor.message(), HeadLost))  # an attempt has failed
    assert not monitor.lost
    with socket.create_server(("127.0.0.1", port)):
        assert monitor.wait_until_known()
    monitor.stop()
