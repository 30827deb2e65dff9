"""The CPUs that this process may use."""

import os

import pytest

from trainer.cluster.environment import available_cpus


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
