"""The first signal requests a stop, the second ends the process, and none is lost."""

import os
import signal

import pytest

from trainer.errors import Interrupted
from trainer.signals import Signals


@pytest.fixture
def signals():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    made = Signals()
    made.install()
    yield made
    for number, handler in handlers.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def test_the_first_asks_and_the_second_ends_at_once(signals):
    asked = []
    with signals.requesting(lambda: asked.append(True)):
        send(signal.SIGTERM)
        assert (asked, signals.raised) == ([True], False)
        with pytest.raises(Interrupted) as ended:
            send(signal.SIGINT)
    assert (len(asked), signals.raised, ended.value.exit_code) == (1, True, 130)


def test_one_whose_error_was_lost_in_foreign_code_still_asks(signals):
    with pytest.raises(Interrupted):  # as if nobody had heard it
        send(signal.SIGTERM)
    asked = []
    with signals.requesting(lambda: asked.append(True)):
        pass
    assert asked == [True]
    assert signals.interrupted().exit_code == 143


def test_while_deferring_the_first_signal_requests_and_is_raised_at_the_end(signals):
    asked, through = [], []
    with (  # noqa: PT012 - the block goes on after the signal
        pytest.raises(Interrupted) as ended,
        signals.deferring(lambda: None, lambda: asked.append(True)),
    ):
        send(signal.SIGTERM)
        through.append(True)
        raise RuntimeError("the start broke off")
    assert (asked, through, ended.value.exit_code) == ([True], [True], 143)
    with signals.deferring(lambda: None):
        """A later block does not raise it again."""


def test_while_deferring_the_second_signal_ends_the_process_at_once(signals, monkeypatch):
    said = []
    monkeypatch.setattr(os, "_exit", lambda code: said.append(code))
    with (  # noqa: PT012 - in between the two signals nothing happens
        pytest.raises(Interrupted),
        signals.deferring(lambda: said.append("last words")),
    ):
        send(signal.SIGTERM)
        assert said == []
        send(signal.SIGINT)
        assert said == ["last words", 130]
