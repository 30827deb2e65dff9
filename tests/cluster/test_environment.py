"""CPUs and GPUs of this process, and notices if workers need more or use fewer."""

import os

import pytest

from trainer.cluster.environment import available_cpus, too_few_cpus
from trainer.cluster.placement import Placement
from trainer.config import ClusterConfig


@pytest.mark.parametrize(
    ("quota", "count"),
    [("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 6), ("", 6)],
)
def test_cpus_are_those_that_this_process_may_use(tmp_path, monkeypatch, quota, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert available_cpus(file) == count
    assert available_cpus(tmp_path / "none") == 6


def test_more_threads_than_cpus_are_mentioned():
    crowded = too_few_cpus(ClusterConfig(workers=4), 2)
    assert crowded.startswith("cluster.workers=4 on 2 CPUs: they share them")
    assert crowded.endswith("cluster.workers=2")
    assert "cluster.workers=3 of 2 threads each on 4 CPUs" in too_few_cpus(
        ClusterConfig(workers=3, threads=2), 4
    )
    assert too_few_cpus(ClusterConfig(workers=4), 4) is None
    assert too_few_cpus(ClusterConfig(workers=1, threads=8), 2) is None


@pytest.mark.parametrize(
    ("settings", "gpus", "reason"),
    [
        ({"workers": 2}, 1, "2 GPUs are needed"),
        ({"workers": 2, "gpus_per_worker": 0.5}, 8, "NCCL takes one GPU per rank"),
        ({"workers": 2}, 0, None),
        ({"workers": 2}, 2, None),
        ({"workers": 2, "device": "cpu"}, 8, None),
    ],
)
def test_gpus_that_stay_unused_are_mentioned(settings, gpus, reason, monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": gpus} if gpus else {})
    placement = Placement(ClusterConfig(**settings))
    placement.choose_device()
    assert placement.device == ("cuda" if gpus == 2 else "cpu")
    if reason is None:
        assert placement.notice is None
    else:
        assert f"although Ray finds GPUs ({gpus})" in placement.notice
        assert reason in placement.notice
