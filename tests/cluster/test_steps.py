"""The steps of a function on a group, for a thread that follows many groups: fakes for Ray."""

import sys
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from trainer.cluster import Step, WorkerFailed, open_group
from trainer.cluster.group import Failure
from trainer.cluster.heartbeat import HeartbeatStatus
from trainer.cluster.rank import Rank
from trainer.cluster.streams import END
from trainer.config import ClusterConfig


class Actor:
    """A worker: its stream of messages is a list, every other call is its name."""

    def __init__(self):
        self.messages, self.calls = [], []
        self.answers = {"identity", "heartbeat"}
        self.run = SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda *args: Stream(self.messages))
        )

    def __getattr__(self, name):
        def remote(*args):
            self.calls.append(name)
            return Call(self, name)

        return SimpleNamespace(remote=remote)


class Stream:
    def __init__(self, messages):
        self.messages = messages


class Call:
    def __init__(self, actor, name):
        self.actor, self.name = actor, name


@pytest.fixture
def worker(monkeypatch):
    """A group of one worker, and its actor."""

    def wait(refs, num_returns=1, timeout=None):
        def is_ready(ref):
            return ref.messages if isinstance(ref, Stream) else ref.name in ref.actor.answers

        found = [ref for ref in refs if is_ready(ref)][:num_returns]
        return found, [ref for ref in refs if ref not in found]

    def get(ref):
        if ref.name == "identity" and "identity" not in ref.actor.answers:
            raise ActorDiedError
        return HeartbeatStatus(0, False, (0, 3), "in phase train, step 3")

    group = open_group(ClusterConfig(workers=1, hang_timeout_s=30))
    fake = SimpleNamespace(wait=wait, get=get, put=lambda value: value, kill=lambda actor: None)
    for name in ("ray_group", "streams", "heartbeat"):
        monkeypatch.setattr(sys.modules[f"trainer.cluster.{name}"], "ray", fake)
    module = sys.modules["trainer.cluster.ray_group"]
    monkeypatch.setattr(module, "receive", lambda stream: stream.messages.pop(0))
    monkeypatch.setattr(module, "lost_nodes", lambda hosts: set())
    monkeypatch.setattr(Rank, "kill", lambda rank: rank.actor.calls.append("kill"))
    monkeypatch.setattr(
        group,
        "_connection",
        SimpleNamespace(
            head=SimpleNamespace(lost=False), check_head=lambda: None, answers=lambda: True
        ),
    )
    actor = Actor()
    group._ranks = [Rank(actor, "host", "n1")]
    return group, actor


def test_messages_and_waits_alternate_until_the_function_ends(worker):
    group, actor = worker
    steps = group.steps(print)
    assert next(steps) is Step.WAIT
    actor.messages += ["one", "two"]
    assert [next(steps) for _ in range(3)] == ["one", "two", Step.WAIT]
    group.stop_requested.set()
    assert next(steps) is Step.WAIT
    assert actor.calls.count("request_stop") == 1
    actor.messages.append(END)
    assert list(steps) == []
    assert "disconnect" not in actor.calls


@pytest.mark.parametrize("alive", [True, False])
def test_a_failure_is_examined_where_it_may_block(worker, alive):
    """Without an answer to the question before the run, the worker was lost before it."""
    group, actor = worker
    if not alive:
        actor.answers.remove("identity")
    steps = group.steps(print)
    assert next(steps) is Step.WAIT
    actor.messages.append(Failure("the process died", ""))
    assert next(steps) is Step.BLOCK
    with pytest.raises(WorkerFailed, match="worker 0 on host: the process died") as error:
        next(steps)
    assert error.value.had_begun is alive
    assert actor.calls[-2:] == ["request_stop", "disconnect"]


def test_a_worker_that_hangs_had_begun(worker, monkeypatch):
    group, actor = worker
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(sys.modules["trainer.cluster.heartbeat"], "time", clock)
    steps = group.steps(print)
    while now[0] <= 30:
        now[0] += 1
        assert next(steps) is Step.WAIT
    now[0] += 2
    assert next(steps) is Step.BLOCK
    with pytest.raises(WorkerFailed, match=r"no progress for cluster\.hang_timeout_s=30; last seen "
                       "in phase train, step 3") as error:  # fmt: skip
        next(steps)
    assert error.value.had_begun
    assert "kill" in actor.calls
