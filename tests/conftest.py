"""What holds for all tests: which run beside which, no deadlines of hypothesis, shared fixtures."""

import os
import signal

import pytest
import torch
from hypothesis import settings

from trainer.cluster.environment import prepare_environment
from trainer.config import ClusterConfig

torch.set_num_threads(1)  # small tensors, and other processes beside this one

# Repeats itself exactly in CI.
settings.register_profile("trainer", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("trainer")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """What starts processes comes first and one by one; a second worker has the rest meanwhile.

    That one takes file after file, so that the fixtures of a module are made once.
    """

    def starts_processes(item):
        return item.get_closest_marker("integration") is not None

    for item in items:
        group = "processes" if starts_processes(item) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=starts_processes, reverse=True)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, with the signal handlers and threads of the tests kept."""
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared_ray():
    """One private Ray with two CPUs for all tests that need one; starting it takes seconds."""
    cfg = ClusterConfig(workers=2)
    prepare_environment(cfg)
    from trainer.cluster.session import RaySession

    session = RaySession(cfg)
    session.open()
    yield
    session.close()
