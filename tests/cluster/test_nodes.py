"""The monitor of the hosts of a cluster, with fakes in place of Ray."""

from trainer.cluster import nodes


def test_silent_hosts_are_forgotten_when_they_answer_and_when_ray_removes_them(monkeypatch):
    """Hosts of a cluster whose nodes come and go must not accumulate."""
    alive = {host: {"NodeManagerAddress": host, "NodeManagerPort": 1} for host in "abc"}
    silent = {"a:1", "b:1", "c:1"}

    def probe(address, timeout_s):
        if address in silent:
            raise OSError

    monkeypatch.setattr(nodes, "alive_nodes", lambda: alive)
    monkeypatch.setattr(nodes, "draining_nodes", set)
    monkeypatch.setattr(nodes, "probe", probe)
    monkeypatch.setattr(nodes.NodeMonitor, "_watch", lambda self: None)  # the test does that
    monitor = nodes.NodeMonitor()
    monitor.add_silent({"a": "host a", "b": "host b", "c": "host c"})
    monitor.check()
    assert monitor.silent == {"a": "host a", "b": "host b", "c": "host c"}
    silent.remove("a:1")
    del alive["b"]
    monitor.check()
    assert monitor.silent == {"c": "host c"}
    del alive["c"]
    monitor.check()
    assert monitor.silent == {}
