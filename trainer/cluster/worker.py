"""The actor: one warm process that executes bodies and streams back what they yield."""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import ray
import torch
from torch.distributed import TCPStore

from trainer.cluster.group import Body, Failure
from trainer.cluster.watch import Sign
from trainer.engine.world import World
from trainer.errors import ConfigError, RunError

CONTROL = "control"
"""Concurrency group of the methods that answer while a body runs."""


class Worker:
    """One rank. Ray calls its methods one after the other, those of CONTROL beside them."""

    def __init__(self, rank: int, size: int, threads: int, nice: int, paths: list[str]) -> None:
        self._rank = rank
        self._size = size
        self._threads = threads
        sys.path.extend(path for path in paths if path not in sys.path)
        with contextlib.suppress(PermissionError):  # a cluster's own, higher niceness may stand
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        self._store: TCPStore | None = None
        self._world: World | None = None
        self._run = 0  # number of the present run
        self._stop_run = 0  # number of the last run that was asked to stop

    def identity(self) -> tuple[str, str, int]:
        """Host name, Ray's node id, process id; answers once the process is up and idle."""
        return socket.gethostname(), ray.get_runtime_context().get_node_id(), os.getpid()

    def sees_cuda(self) -> bool:
        """Whether torch can use a GPU here."""
        return torch.cuda.is_available()

    def listen(self, host: str | None, timeout_s: float) -> tuple[str, int]:
        """Rank 0: open the meeting point on `host` (None: this node's address); host and port."""
        host = host or ray.util.get_node_ip_address()
        self._store = World.listen(host, timeout_s)
        return host, self._store.port

    def connect(self, host: str, port: int, device: str, timeout_s: float) -> None:
        """Join the other ranks, in a new group."""
        if self._world:
            self._world.close()
        # Ray shows a worker its own GPUs only, counted from 0.
        place = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
        self._world = World.connect(
            self._rank, self._size, host, port, place, timeout_s, self._store
        )

    def run(self, number: int, body: Body, *args: Any) -> Iterator[Any]:
        """Execute the body; rank 0 passes on what it yields, every rank a failure as the last.

        Args:
            number: of this run, for `stop_soon`.
        """
        world = self._world
        assert world is not None
        world.stop.clear()
        self._run = number
        if self._stop_run == number:  # the request was faster
            world.stop.set()
        torch.set_num_threads(self._threads)  # holds for the thread that calls it
        try:
            for message in body(world, *args):
                if self._rank == 0:
                    yield message
        except (Exception, SystemExit) as error:
            world.close()  # the others must not wait for this rank
            known = isinstance(error, ConfigError | RunError)
            yield Failure(
                reason=str(error) if known else f"{type(error).__name__}: {error}",
                detail=traceback.format_exc(),
                wrong_config=isinstance(error, ConfigError),
                final=isinstance(error, RunError),
                peer=isinstance(error, ConnectionError | TimeoutError),
                place=world.heartbeat.position,
            )

    @ray.method(concurrency_group=CONTROL)
    def sign(self) -> Sign | None:
        """A sign of life; None before the ranks are connected."""
        if self._world is None:
            return None
        heartbeat = self._world.heartbeat
        return Sign(heartbeat.beats, heartbeat.is_busy, heartbeat.position, heartbeat.where)

    @ray.method(concurrency_group=CONTROL)
    def stop_soon(self, number: int) -> None:
        """Let the body of run `number` end at its next step; another run goes on."""
        self._stop_run = number
        if self._world and self._run == number:
            self._world.stop.set()
