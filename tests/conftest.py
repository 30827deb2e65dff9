"""Settings of all tests: their order, no deadlines of hypothesis, shared fixtures."""

import gc
import os
import signal

import pytest

# Of processes that tests start, too: threads that wait for one another cost more than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

from trainer.cluster import open_group
from trainer.cluster.environment import prepare_environment
from trainer.config import ClusterConfig

LONG = (  # files that take a minute or more
    *("test_sweep.py", "test_resume_workers.py", "test_examples.py", "test_existing_cluster.py"),
    *("test_site.py", "test_hosts.py", "test_main.py", "test_resume.py"),
)

gc.set_threshold(100_000, 20, 50)  # collecting garbage took a sixth of the time of all imports
torch.set_num_threads(1)  # small tensors, and other processes beside this one

# Repeats itself exactly in CI.
settings.register_profile("trainer", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("trainer")


@pytest.hookimpl(tryfirst=True)  # before "-m" selects
def pytest_collection_modifyitems(items):
    """Of three files at a time, the long ones come first, and then those with slow tests."""
    for item in items:
        if item.get_closest_marker("integration"):
            item.add_marker("slow")
    first = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in LONG, item.path not in first))


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


@pytest.fixture
def charts_not_drawn(monkeypatch):
    """Skip the slowest part of a run of seconds, for tests that do not look at its charts."""
    monkeypatch.setattr(
        "matplotlib.backends.backend_svg.FigureCanvasSVG.print_svg",
        lambda canvas, file, **_: file.write("<svg></svg>"),
    )


@pytest.fixture(scope="session")
def shared_ray():
    """One private Ray with two CPUs for all tests that need one; starting it takes seconds."""
    cfg = ClusterConfig(workers=2)
    prepare_environment()
    from trainer.cluster.connection import RayConnection

    connection = RayConnection(cfg)
    connection.open()
    yield
    connection.close()


class WarmGroup:
    """Two started workers for all runs and sessions of a module that have no other settings.

    Passes for the group of a run or session, which starts and stops it; the workers keep running
    until another group needs their CPUs.
    """

    def __init__(self):
        self._cfg = ClusterConfig(workers=2)
        self._group = None

    def open(self, cfg):
        if cfg != self._cfg:
            self.release()
            return open_group(cfg)
        if self._group is None:
            self._group = open_group(cfg)
            self._group.start()
        return self

    def start(self):
        self._group.stop_requested.clear()
        self._group.restart()

    def stop(self):
        pass

    def release(self):
        if self._group is not None:
            self._group.stop()
            self._group = None

    def __getattr__(self, name):
        return getattr(self._group, name)


@pytest.fixture(scope="module")
def warm_group(shared_ray):
    group = WarmGroup()
    yield group
    group.release()


@pytest.fixture
def warm_workers(warm_group, monkeypatch):
    """For tests of what runs on workers: starting two takes ten seconds of one CPU."""
    for place in ("driver.run", "library.session", "cluster.fleet"):
        monkeypatch.setattr(f"trainer.{place}.open_group", warm_group.open)
