"""Worker functions that the tests execute on worker groups."""

import gc
import importlib
import os
import signal
import threading
import time
import typing
import weakref

import torch

from trainer.errors import ConfigError


def ranks(world, n):
    """Yield n messages, each with the sum of all ranks."""
    for i in range(n):
        total = torch.tensor([float(world.rank)])
        world.all_reduce(total)
        yield i, world.rank, world.size, total.item()


def environment(world):
    """How this worker is set up."""
    yield torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, 0), os.getpid(), os.getcwd()


def slow(world):
    """Two messages with a second between them, stamped when they were made."""
    yield time.time()
    time.sleep(1)
    yield time.time()


def raises_on_last(world):
    """The last rank raises while the others wait for it."""
    yield "before"
    world.barrier()
    if world.rank == world.size - 1:
        raise KeyError("lost key")
    world.barrier()


def wrong_config(world):
    yield "before"
    raise ConfigError("data.root=/nowhere: there is no such folder")


def until_stopped(world, limit_s):
    """Run, on all ranks alike, until rank 0 is requested to stop; yield whether it was."""
    deadline = time.time() + limit_s
    requested = torch.zeros(1)
    yield "started"
    while not requested.any() and time.time() < deadline:
        time.sleep(0.01)
        requested = torch.tensor([float(world.rank == 0 and world.stop.is_set())])
        world.all_reduce(requested)
    yield bool(requested.any())


class Unpicklable(Exception):
    """Cannot be rebuilt from its arguments."""

    def __init__(self, a, b):
        super().__init__("odd")


def raises_unpicklable(world):
    """Rank 0 raises while the others wait for it."""
    yield "before"
    if world.rank == 0:
        raise Unpicklable(1, 2)
    world.barrier()


def dies_on_last(world):
    """The last rank is killed while the others wait for it."""
    yield "before"
    world.barrier()
    if world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def takes_long(world, seconds):
    """Rank 0 does one long thing, the others one short thing after the other."""
    deadline = time.time() + seconds
    if world.rank == 0:
        with world.heartbeat.busy():
            time.sleep(seconds)
    while time.time() < deadline:
        time.sleep(0.1)
        world.heartbeat.beat()
    yield "done"


def stands_still(world):
    """The last rank neither works nor says why; the others wait for it."""
    world.heartbeat.begin("in phase train", 0, 17)
    if world.rank == world.size - 1:
        time.sleep(60)
    world.barrier()
    yield "done"


class Cyclic:
    """Refers to itself, so that only the garbage collector frees it."""

    alive: typing.ClassVar = weakref.WeakSet()

    def __init__(self):
        self.itself = self
        self.alive.add(self)


def leaves_a_cycle(world):
    gc.disable()
    Cyclic()
    yield len(Cyclic.alive)


def living_cycles(world):
    gc.enable()
    yield len(Cyclic.alive)


def endless(world):
    """Yields for as long as the iterator is open and rank 0 has not been requested to stop."""
    stop = torch.zeros(1)
    while not stop.any():
        yield "running"
        time.sleep(0.01)
        stop = torch.tensor([float(world.rank == 0 and world.stop.is_set())])
        world.all_reduce(stop)


class Unloadable:
    """Its pickle imports a module that does not exist."""

    def __reduce__(self):
        return importlib.import_module, ("no_such_module",)


def receives(world, value):
    yield "received"


def sends_a_lock(world):
    yield threading.Lock()
