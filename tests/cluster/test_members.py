"""The members of the next group, and losses that use up no restart: pure functions."""

import sys
from types import SimpleNamespace

import pytest

from trainer.cluster import nodes, open_group, placement
from trainer.cluster.group import Failure
from trainer.cluster.members import Answer, choose, to_drop
from trainer.cluster.rank import Rank
from trainer.cluster.restart import WorkerLoss, why_not_restart
from trainer.config import ClusterConfig

EARLIER, LATER = (0, 7, 2), (0, 8, 0)


def ranks(answers):
    return [answer.rank for answer in answers]


def test_the_latest_state_becomes_rank_0_and_the_others_keep_their_order():
    answers = [Answer(3, LATER), Answer(0, EARLIER), Answer(2, LATER), Answer(1, None)]
    assert ranks(choose(answers, 0, 1)) == [2, 0, 1, 3]
    assert ranks(choose([Answer(1, None), Answer(0, None)], 0, 1)) == [0, 1]
    assert choose([], 2, 1) == []


def test_workers_whose_host_leaves_stay_only_where_too_few_would_be_left():
    answers = [Answer(0, LATER, leaves=True), Answer(1, LATER), Answer(2, LATER, leaves=True)]
    assert ranks(choose(answers, 0, 1)) == [1]
    assert ranks(choose(answers, 0, 2)) == [0, 1]
    assert ranks(choose(answers, 1, 2)) == [1]
    assert ranks(choose(answers, 0, 3)) == [0, 1, 2]


def test_the_rank_that_the_others_cannot_reach_is_left_out():
    assert to_drop([0, 2, 3], [2, None, 2]) == 2
    assert to_drop([1, 2], [2, 1]) == 2  # they cannot reach each other: rank 0 is none of them
    assert to_drop([0, 1], [None, None]) == 1


def test_hosts_that_leave_use_up_no_restarts():
    left = WorkerLoss("the process died", (0, 3), has_left=True)
    died = WorkerLoss("the process died", (0, 3))
    assert why_not_restart([left] * 9, 0) is None
    assert why_not_restart([left, left, died], 1) is None
    assert "cluster.max_restarts=0" in why_not_restart([left, died], 0)


@pytest.mark.parametrize("min_workers", [None, 1])
def test_the_worker_that_was_lost_first_is_named(min_workers, monkeypatch):
    """Rank 0 lost rank 1, which ended because it had lost rank 2, which says nothing."""
    group = open_group(ClusterConfig(workers=3, min_workers=min_workers))
    monkeypatch.setattr(group._connection, "answers", lambda: False)  # it is not open
    group._ranks = [Rank(None, node) for node in ("h1", "h2", "h3")]
    late = [Failure("PeerLost: rank 1 lost rank 2", "", is_peer_loss=True, lost_rank=2)]
    module = sys.modules["trainer.cluster.root_cause"]
    monkeypatch.setattr(module, "ready", lambda streams, timeout: list(streams)[:1] if late else [])
    monkeypatch.setattr(module, "receive", lambda stream: late.pop())
    first = Failure("PeerLost: rank 0 lost rank 1", "", is_peer_loss=True, lost_rank=1)
    group.streams = {"zero": 0, "one": 1, "two": 2}
    messages, error = group._find_root_cause(0, first)
    assert messages == []
    assert str(error) == "worker 2 on h3: PeerLost: rank 1 lost rank 2"
    # Ray reports the end of a process at once, unless its host is lost too.
    assert error.has_left is (min_workers is not None)
    assert group._suspects == {1, 2}


def test_no_worker_starts_on_a_host_that_is_silent_until_it_answers(monkeypatch):
    """Ray takes a host that lost its power for alive, and would use its resources again."""
    group = open_group(ClusterConfig(workers=3, min_workers=1, hang_timeout_s=0.01))
    module = sys.modules["trainer.cluster.elastic"]
    alive = {host: {"NodeManagerAddress": host, "NodeManagerPort": 1} for host in ("n1", "n2")}
    answering = {"n1:1"}
    requested, killed = [], []  # where recruits may start; those that were ended

    def probe(address, timeout_s):
        if address not in answering:
            raise OSError

    def new_actor(rank):
        requested.append(group._placement.selector())
        return SimpleNamespace(identity=SimpleNamespace(remote=object))

    for name, fake in (("alive_nodes", lambda: alive), ("draining_nodes", set), ("probe", probe)):
        monkeypatch.setattr(nodes, name, fake)
    monkeypatch.setattr(placement, "alive_nodes", lambda: alive)
    monkeypatch.setattr(module.NodeMonitor, "_watch", lambda self: None)  # the test does that
    monkeypatch.setattr(group, "_new_actor", new_actor)
    fake_ray = SimpleNamespace(
        wait=lambda refs, **_: ([ref for ref in refs if ref == "n1 answers"], []),
        get=lambda ref: (0, 1, 0),
        kill=killed.append,
    )
    for name in ("ray_group", "recruits"):
        monkeypatch.setattr(sys.modules[f"trainer.cluster.{name}"], "ray", fake_ray)
    monkeypatch.setattr(Rank, "kill", lambda rank: None)
    monkeypatch.setattr(group, "_connection", SimpleNamespace(head=SimpleNamespace(lost=False)))
    group._nodes = module.NodeMonitor()

    def worker(number):
        def call(answer):
            return SimpleNamespace(remote=lambda: answer)

        actor = SimpleNamespace(kept=call(f"n{number} answers"), heartbeat=call(object()))
        return Rank(actor, f"h{number}", f"n{number}")

    group._ranks, group._runs = [worker(1), worker(2)], 1
    group._attend()
    assert requested == [{}]  # the third worker waits for resources, on any host
    assert [answer.rank for answer in group._answers()] == [0]
    group._attend()
    assert len(killed) == 1  # it could have started on h2
    assert requested[1:] == [{"ray.io/node-id": "!in(n2)"}]
    group._nodes.check()
    group._attend()
    assert len(requested) == 2  # nothing has changed
    answering.add("n2:1")
    group._nodes.check()
    group._attend()
    assert requested[2:] == [{}]
