"""Which hosts the workers of a fixed group start on after a loss: with fakes in place of Ray."""

import os
import sys
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from trainer.cluster import InsufficientResources, nodes, open_group
from trainer.cluster.group import Failure
from trainer.cluster.placement import Placement, to_avoid
from trainer.cluster.rank import kill_process
from trainer.config import ClusterConfig
from trainer.errors import RunError


@pytest.mark.parametrize(
    ("links", "capacity", "keep", "expected"),
    [
        ([], {"a": 1}, "", set()),
        (["ab"], {"a": 1, "b": 1, "c": 1}, "a", {"b"}),
        (["ab"], {"a": 1, "b": 1, "c": 1}, "b", {"a"}),
        (["ab"], {"a": 1, "b": 4}, "", {"a"}),  # the others can hold more workers
        (["ab", "cb"], {"a": 1, "b": 4, "c": 1}, "b", {"b"}),  # most cannot reach it
        (["ab"], {"a": 1}, "", set()),  # b has left
    ],
)
def test_hosts_are_avoided_until_all_others_can_reach_each_other(links, capacity, keep, expected):
    assert to_avoid(links, capacity, keep) == expected


def test_hosts_are_lost_if_they_are_gone_leave_or_do_not_answer(monkeypatch):
    def probe(address, timeout_s):
        if address == "b:1":
            raise OSError

    alive = {host: {"NodeManagerAddress": host, "NodeManagerPort": 1} for host in "abc"}
    monkeypatch.setattr(nodes, "alive_nodes", lambda: alive)
    monkeypatch.setattr(nodes, "draining_nodes", lambda: {"c"})
    monkeypatch.setattr(nodes, "probe", probe)
    assert nodes.lost_nodes("abcd") == {"b", "c", "d"}
    assert nodes.lost_nodes("cd") == {"c", "d"}
    assert nodes.lost_nodes("a") == set()


class Cluster:
    """Hosts with a CPU each, and the actors that Ray places on them."""

    def __init__(self, monkeypatch, hosts):
        self.alive = list(hosts)  # as Ray sees them
        self.unreachable = set()
        self.answers_heartbeat = True
        self.links = set()  # pairs of hosts without connection
        self.avoided = set()  # hosts of the present placement group's selector
        self.bundles = {}  # rank -> host
        self.created = []  # (rank, host) of each actor
        self.busy = {}  # host -> how often its worker is asked until its function has returned
        placement = sys.modules["trainer.cluster.placement"]
        group = sys.modules["trainer.cluster.ray_group"]
        for module in (placement, group):
            monkeypatch.setattr(module, "alive_nodes", self.nodes)
        monkeypatch.setattr(placement, "placement_group", self.reserve)
        monkeypatch.setattr(placement, "placement_group_table", self.table)
        monkeypatch.setattr(placement, "remove_placement_group", lambda group: None)
        monkeypatch.setattr(placement, "state", self)
        monkeypatch.setattr(group, "lost_nodes", self.lost)
        fake_ray = SimpleNamespace(wait=wait, get=get)
        for module in (group, sys.modules["trainer.cluster.connect"]):
            monkeypatch.setattr(module, "ray", fake_ray)
        monkeypatch.setattr("trainer.cluster.rank.Rank.kill", lambda rank: None)
        monkeypatch.setattr(group, "died", died)

    def nodes(self):
        return {host: {"Resources": {"CPU": 1.0}} for host in self.alive}

    def available_resources_per_node(self):
        return {host: {"CPU": 1.0} for host in self.alive}

    def lost(self, hosts):
        return {host for host in hosts if host not in self.alive or host in self.unreachable}

    def reserve(self, bundles, strategy, bundle_label_selector):
        selector = bundle_label_selector[0] if bundle_label_selector else {}
        text = next(iter(selector.values()), "!in()")
        self.avoided = set(text.removeprefix("!in(").removesuffix(")").split(","))
        self.bundles = {}
        for rank in range(len(bundles)):
            self.bundles[rank] = self.free_host()
        return SimpleNamespace(wait=lambda timeout: None not in self.bundles.values())

    def free_host(self):
        used = self.bundles.values()
        free = [h for h in self.alive if h not in used and h not in self.avoided]
        return free[0] if free else None

    def table(self, group):
        for rank, host in self.bundles.items():
            if host not in self.alive:
                self.bundles[rank] = self.free_host()
        return {"bundles_to_node_id": dict(self.bundles)}

    def actor(self, rank):
        self.table(None)
        self.created.append((rank, self.bundles[rank]))
        return Actor(self, self.bundles[rank])


class Actor:
    """Its calls return themselves: `wait` and `get` below know their answers."""

    def __init__(self, cluster, host):
        self.cluster, self.host = cluster, host

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *args: Call(self, name, args))


class Call:
    def __init__(self, actor, name, args):
        self.actor, self.name, self.args = actor, name, args

    def answers(self):
        cluster, host = self.actor.cluster, self.actor.host
        if host not in cluster.alive:
            return True
        if self.name == "heartbeat":
            return cluster.answers_heartbeat and host not in cluster.unreachable
        if self.name == "identity" and cluster.busy.get(host):
            cluster.busy[host] -= 1
            return False
        if host in cluster.unreachable:
            if self.name == "identity" and cluster.notices_at_next_wait:
                cluster.alive.remove(host)
            return False
        return True

    def result(self):
        cluster, host = self.actor.cluster, self.actor.host
        if host not in cluster.alive:
            raise ActorDiedError
        if self.name == "listen":
            return host, 1, "token"
        if self.name == "connect":
            rank, first = self.args[0], self.args[2]
            if rank and frozenset((first, host)) in cluster.links:
                return Failure("no way", "", lost_rank=0, is_unreachable=True)
            return None
        return host, host, 0, 0.0


def wait(calls, num_returns=1, timeout=None):
    found = [call for call in calls if call.answers()][:num_returns]
    return found, [call for call in calls if call not in found]


def get(calls, timeout=None):
    return [call.result() for call in calls] if isinstance(calls, list) else calls.result()


def died(call):
    return call.actor.host not in call.actor.cluster.alive


@pytest.fixture
def make(monkeypatch):
    def start(hosts):
        monkeypatch.setattr("trainer.cluster.ray_group.SUSPECT_WAIT_S", 0)
        group = open_group(ClusterConfig(workers=2, device="cpu", start_timeout_s=0.01))
        cluster = Cluster(monkeypatch, hosts)
        cluster.notices_at_next_wait = False
        monkeypatch.setattr(group, "_new_actor", cluster.actor)
        monkeypatch.setattr(
            group,
            "_connection",
            SimpleNamespace(private=False, open=lambda: None, check_head=lambda: None),
        )
        group.start()
        assert group.nodes == ["a", "b"]
        cluster.created.clear()
        return group, cluster

    return start


def test_a_lost_host_that_ray_knows_of_is_replaced_and_the_others_stay_warm(make):
    group, cluster = make("abc")
    cluster.alive.remove("b")
    group.restart()
    assert (group.nodes, cluster.created) == (["a", "c"], [(1, "c")])


def test_all_move_away_from_a_silent_host_that_ray_still_takes_for_alive(make):
    group, cluster = make("abc")
    cluster.unreachable, group._suspects = {"b"}, {1}
    group.restart()
    assert group.nodes == ["a", "c"]
    assert group.notices == ["b lost: the workers start on other hosts"]


def test_without_another_host_a_restart_waits_until_ray_notices_the_loss(make):
    group, cluster = make("ab")
    group._suspects = {1}
    cluster.unreachable, cluster.notices_at_next_wait = {"b"}, False
    end_lost = group._end_lost

    def then_notice(method):
        answers = end_lost(method)
        cluster.notices_at_next_wait = True
        return answers

    group._end_lost = then_notice
    with pytest.raises(
        InsufficientResources, match=r"b is lost; 2 CPU needed, 1 of 1 free; add hosts"
    ):
        group.restart()
    assert cluster.created[0] == (1, "b")  # it is back if the host answers again


@pytest.mark.parametrize("answers", [True, False])
def test_a_worker_that_others_have_lost_is_kept_if_it_answers(make, answers):
    """It has closed its connections because it lost another worker, and stores its state."""
    group, cluster = make("abc")
    group.busy_wait_s, group._suspects, cluster.busy = 60, {1}, {"b": 3}
    cluster.answers_heartbeat = answers
    group.restart()
    assert group.nodes == ["a", "b"]
    assert cluster.created == ([] if answers else [(1, "b")])


def test_a_worker_that_never_ran_because_its_host_was_lost_is_requested_again(make):
    group, cluster = make("abcd")
    cluster.alive.remove("b")
    new_actor = group._new_actor

    def on_a_host_that_dies(rank):
        actor = new_actor(rank)
        if actor.host == "c":
            cluster.alive.remove("c")
        return actor

    group._new_actor = on_a_host_that_dies
    group.restart()
    assert (group.nodes, cluster.created) == (["a", "d"], [(1, "c"), (1, "d")])


def test_a_worker_that_dies_at_its_start_on_a_living_host_is_an_error(make, monkeypatch):
    group, cluster = make("abc")
    cluster.alive.remove("b")

    def crash(call):
        if call.actor.host == "c":
            raise ActorDiedError
        return call.result()

    monkeypatch.setattr(sys.modules["trainer.cluster.ray_group"].ray, "get", crash)
    with pytest.raises(RunError, match="the workers did not start"):
        group.restart()


def test_hosts_that_cannot_reach_each_other_are_not_used_together_again(make):
    group, cluster = make("abc")
    cluster.links = {frozenset("ab")}
    group.restart()
    assert group.nodes == ["a", "c"]
    assert group.notices == ["b cannot reach a: the workers start on other hosts"]
    cluster.alive.remove("c")
    with pytest.raises(InsufficientResources, match=r"b cannot reach a; 2 CPU needed, 1 of 1 free"):
        group.restart()
    group, cluster = make("ab")
    cluster.links = {frozenset("ab")}
    with pytest.raises(InsufficientResources, match=r"b cannot reach a; 2 CPU needed, 1 of 1 free"):
        group.restart()


def test_a_host_is_avoided_as_long_as_the_other_end_of_its_bad_link_is_alive(make):
    _, cluster = make("abc")
    placement = Placement(ClusterConfig(workers=2))
    placement.disconnected({frozenset("ab"): "b cannot reach a"}, keep="a")
    assert placement.avoided() == {"b"}
    assert placement.selector() == {"ray.io/node-id": "!in(b)"}
    cluster.alive.remove("a")
    assert placement.avoided() == set()
    assert placement.selector() == {}


def test_a_process_that_took_over_an_id_is_not_killed():
    kill_process(os.getpid(), started=1.0)  # a second after 1970
    kill_process(2**22 + 1, started=1.0)  # beyond the largest process id of Linux
