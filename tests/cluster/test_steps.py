"""The steps of a function on a group, for a thread that follows many groups: fakes for Ray."""

import sys
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
)

from trainer.cluster import Step, WorkerFailed, open_group, root_cause, streams
from trainer.cluster.group import Failure
from trainer.cluster.heartbeat import HeartbeatStatus
from trainer.cluster.rank import Rank
from trainer.cluster.streams import END
from trainer.cluster.worker import Worker
from trainer.config import ClusterConfig
from trainer.engine.world import World


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
    for each in (module, root_cause):
        monkeypatch.setattr(each, "receive", lambda stream: stream.messages.pop(0))
        monkeypatch.setattr(each, "lost_nodes", lambda hosts: set())
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


DIED = Failure("the process died", "", has_died=True)
RAISED = Failure("ValueError: wrong", "")
PEER_LOST = Failure("PeerLost: rank 0 lost rank 1", "", is_peer_loss=True, lost_rank=1)


@pytest.mark.parametrize(
    ("failure", "answers", "asked", "has_left"),
    [
        (DIED, [True, True], ["n1", "n1"], False),
        (DIED, [False], ["n1"], True),
        (DIED, [True, False], ["n1", "n1"], True),  # its processes died before it
        (PEER_LOST, [True, True], ["n2", "n2"], False),
        (PEER_LOST, [True, False], ["n2", "n2"], True),
        (RAISED, [], [], False),
    ],
)
def test_the_host_of_a_worker_that_died_or_is_silent_is_asked_twice_whether_it_is_there(
    worker, monkeypatch, failure, answers, asked, has_left
):
    group, actor = worker
    group._ranks.append(Rank(Actor(), "other", "n2"))
    seen, waits = [], []
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=waits.append)
    monkeypatch.setattr(root_cause, "time", clock)

    def lost_nodes(hosts):
        seen.extend(hosts)
        return set() if answers[len(seen) - 1] else set(hosts)

    monkeypatch.setattr(root_cause, "lost_nodes", lost_nodes)
    actor.messages.append(failure)
    with pytest.raises(WorkerFailed) as error:
        list(group.steps(print))
    assert error.value.has_left is error.value.loss.has_left is has_left
    assert seen == asked
    assert waits == [root_cause.GOING_WAIT_S] * (len(asked) == 2)


class Messages:
    """The stream of a worker that ends with an error of Ray."""

    def __init__(self, error):
        self.error = error

    def __next__(self):
        return self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ActorDiedError(), ("the process died", True, False)),
        (ActorUnavailableError("no answer", None), ("the process died", True, False)),
        (OutOfMemoryError("killed"), ("OutOfMemoryError", True, False)),
        (RayActorError(preempted=True), ("the process died", True, True)),
        (RAISED, (RAISED.reason, False, False)),
    ],
)
def test_errors_of_ray_are_failures_of_workers_that_died(monkeypatch, error, expected):
    def get(message):
        if isinstance(message, Exception):
            raise message
        return message

    monkeypatch.setattr(streams, "ray", SimpleNamespace(get=get))
    failure = streams.receive(Messages(error))
    assert (failure.reason, failure.has_died, failure.has_left) == expected


def test_a_worker_is_up_only_when_it_has_what_torch_imports_for_an_optimizer(monkeypatch):
    """The import takes about a second, during which the group that it joins would wait for it."""
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    with pytest.raises(ModuleNotFoundError, match=r"torch\._dynamo"):
        Worker(1, 0, [])


@pytest.mark.parametrize(("error", "has_died"), [(SystemExit, True), (ValueError, False)])
def test_a_worker_that_is_told_to_end_counts_as_dead(error, has_died):
    """Ray raises SystemExit in the function if the process receives SIGTERM."""

    def function(world):
        raise error("why")
        yield

    one = Worker(1, 0, [])
    one._world = World.single(torch.device("cpu"))
    (failure,) = one.run(1, function)
    assert failure.reason == f"{error.__name__}: why"
    assert failure.has_died is has_died


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
