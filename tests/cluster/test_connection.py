"""Connections to Ray, in a process of their own, since a process has one connection at a time."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
from trainer.cluster.environment import prepare_environment
from trainer.config import ClusterConfig
from trainer.errors import ConfigError, RunError

prepare_environment()
import ray
from trainer.cluster.connection import RayConnection

assert "RAY_AUTH_TOKEN" not in os.environ


def slow(failures):
    init = ray.init

    def start(**options):
        nonlocal failures
        folders.append(options["_temp_dir"])
        failures -= 1
        if failures >= 0:
            raise Exception("The current node timed out during startup.")
        return init(**options)

    ray.init, folders = start, []
    return init, folders


init, folders = slow(2)
connection = RayConnection(ClusterConfig(workers=1))
try:
    connection.open()
except RunError as error:
    print(error)
connection.close()
assert len(set(folders)) == 2
assert not any(map(os.path.exists, folders))
assert "RAY_AUTH_TOKEN" not in os.environ
ray.init = init
init, _ = slow(1)
tokens = []
for _ in range(2):
    connection = RayConnection(ClusterConfig(workers=1))
    connection.open()
    tokens.append(os.environ["RAY_AUTH_TOKEN"])
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    present = ray.get_runtime_context().gcs_address
    RayConnection(ClusterConfig(workers=1, address=present)).open()
    try:
        RayConnection(ClusterConfig(workers=1, address="127.0.0.1:1")).open()
    except ConfigError as error:
        print(error)
    connection.close()
    connection.close()
    assert "RAY_AUTH_TOKEN" not in os.environ
assert len(set(tokens)) == 2
"""


@pytest.mark.integration
def test_private_rays_one_after_the_other_of_which_the_first_needs_two_attempts(tmp_path):
    environ = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    failed, first, second = done.stdout.splitlines()
    assert failed.startswith(
        "Ray did not start on this machine, twice (The current node timed out during startup.); the"
    )
    assert failed.endswith("or run without Ray: cluster=inline")
    for line in (first, second):
        assert line.startswith("cluster.address=127.0.0.1:1: this process is connected to the Ray")
