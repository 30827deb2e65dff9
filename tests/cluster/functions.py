"""Bodies that the worker groups of the tests execute."""

import os
import signal
import time

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
    """Go on, all ranks alike, until rank 0 is asked to stop; whether it was."""
    deadline = time.time() + limit_s
    asked = torch.zeros(1)
    yield "started"
    while not asked.any() and time.time() < deadline:
        time.sleep(0.01)
        asked = torch.tensor([float(world.rank == 0 and world.stop.is_set())])
        world.all_reduce(asked)
    yield bool(asked.any())


class Unpicklable(Exception):
    """Cannot be rebuilt from its arguments."""

    def __init__(self, a, b):
        super().__init__("odd")


def raises_unpicklable(world):
    yield "before"
    raise Unpicklable(1, 2)


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
