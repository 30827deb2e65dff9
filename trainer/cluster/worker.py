"""The Ray actor of one worker: a warm process that executes functions and streams their results."""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from trainer.imports import collector_paused

with collector_paused():
    import psutil
    import ray
    import torch

    from trainer.cluster.group import Failure, WorkerFunction
    from trainer.cluster.heartbeat import HeartbeatStatus
    from trainer.cluster.memory import memory_released
    from trainer.engine.rendezvous import RendezvousServer
    from trainer.engine.transport import PeerLost
    from trainer.engine.world import World
    from trainer.errors import ConfigError, RunError, described
    from trainer.messages import Handover

CONTROL = "control"
"""Concurrency group of the methods that answer while a function runs."""


class Worker:
    """One rank. Ray calls its methods one after the other, those of CONTROL in parallel to them."""

    def __init__(self, threads: int, nice: int, paths: list[str]) -> None:
        self._rank = 0  # in the current group
        self._threads = threads
        sys.path.extend(path for path in paths if path not in sys.path)
        # torch needs it for the first optimizer: others would wait for a worker that joins them.
        with collector_paused():
            import_module("torch._dynamo")
        with contextlib.suppress(PermissionError):  # the niceness is already higher
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        self._server: RendezvousServer | None = None
        self._world: World | None = None
        self._handover: Handover | None = None  # the state with which the last run stopped
        self._run = 0  # number of the current run
        self._stopped_run = 0  # number of the last run that was requested to stop
        self._changed_run = 0  # number of the last run that was requested to change its members

    def identity(self) -> tuple[str, str, int, float]:
        """The fields of `Rank` but for its actor. Answers once the process is up and idle."""
        node_id = ray.get_runtime_context().get_node_id()
        return socket.gethostname(), node_id, os.getpid(), psutil.Process().create_time()

    def sees_cuda(self) -> bool:
        """Whether torch can use a GPU in this process."""
        return torch.cuda.is_available()

    def listen(self, host: str | None) -> tuple[str, int, str]:
        """On rank 0: open the rendezvous of a new group.

        Args:
            host: the address to listen on; None: the address of this node.

        Returns:
            Host, port and token of the rendezvous.
        """
        if self._server is not None:
            self._server.close()  # of a group that was never connected
        host = host or ray.util.get_node_ip_address()
        self._server = World.listen(host)
        return host, self._server.port, self._server.token

    def kept(self) -> tuple[int, int, int] | None:
        """The position of the state that this worker keeps. Answers once no function runs."""
        return None if self._handover is None else self._handover.position

    def connect(
        self,
        rank: int,
        size: int,
        host: str,
        port: int,
        token: str,
        device: str,
        timeout_s: float,
        wait_s: float,
        keep: bool,
    ) -> Failure | None:
        """Join the other ranks in a new group.

        Args:
            rank: of this worker in the group.
            size: number of ranks.
            host: of the rendezvous, as `listen` returned it.
            port: likewise.
            token: likewise.
            device: cpu or cuda.
            timeout_s: limit of this call, in seconds.
            wait_s: limit of each later wait for the other ranks, in seconds.
            keep: whether the group may continue from a state that a rank keeps.

        Returns:
            The reason why the group is not complete; None: it is complete.
        """
        self._rank = rank
        if self._world:
            self._world.close()
        if not keep:
            self._handover = None
        # Ray shows a worker its own GPUs only, counted from 0.
        place = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
        server = self._server if rank == 0 else None
        try:
            world = World.connect(rank, size, host, port, place, timeout_s, server, token, wait_s)
        except RunError as error:
            cause = error.__cause__
            peer = cause if isinstance(cause, PeerLost) else None
            return Failure(
                str(error),
                traceback.format_exc(),
                lost_rank=peer.rank if peer else None,
                is_unreachable=peer is not None and peer.unreachable,
            )
        if rank == 0:
            world.kept = self._handover
        self._world = world
        return None

    def run(self, number: int, function: WorkerFunction, *args: Any) -> Iterator[Any]:
        """Execute the function. Rank 0 yields what it yields; every rank yields its own failure.

        Args:
            number: the number of this run, for `request_stop`.
            function: see `WorkerFunction`.
            args: its arguments after `world`.
        """
        world = self._world
        assert world is not None
        world.stop.clear()
        world.change.clear()
        self._run = number
        if self._stopped_run == number:  # the request arrived before the run
            world.stop.set()
        if self._changed_run == number:
            world.change.set()
        state: Handover | None = None
        torch.set_num_threads(self._threads)  # applies only to the thread that calls it
        with memory_released(world.device):
            try:
                for message in function(world, *args):
                    if isinstance(message, Handover):
                        state = message
                    elif self._rank == 0:
                        yield message
                self._handover = state
            except (Exception, SystemExit) as error:
                world.close()  # so that the other ranks do not wait for this one
                self._handover = state or self._handover
                known = isinstance(error, ConfigError | RunError)
                yield Failure(
                    reason=str(error) if known else described(error),
                    detail=traceback.format_exc(),
                    is_config_error=isinstance(error, ConfigError),
                    is_permanent=isinstance(error, RunError),
                    is_peer_loss=isinstance(error, ConnectionError | TimeoutError),
                    has_died=isinstance(error, SystemExit),  # by SIGTERM: its host may shut down
                    position=world.heartbeat.position,
                    lost_rank=error.rank if isinstance(error, PeerLost) else None,
                )
            finally:
                world.kept = None

    @ray.method(concurrency_group=CONTROL)
    def heartbeat(self) -> HeartbeatStatus | None:
        """The state of the heartbeat; None before the ranks are connected."""
        if self._world is None:
            return None
        heartbeat = self._world.heartbeat
        return HeartbeatStatus(
            heartbeat.beats, heartbeat.is_busy, heartbeat.position, heartbeat.where
        )

    @ray.method(concurrency_group=CONTROL)
    def request_stop(self, number: int) -> None:
        """End the function of run `number` at its next step. Other runs are not affected."""
        self._stopped_run = number
        if self._world and self._run == number:
            self._world.stop.set()

    @ray.method(concurrency_group=CONTROL)
    def request_change(self, number: int) -> None:
        """Stop the function of run `number` at its next step, to continue with other members."""
        self._changed_run = number
        if self._world and self._run == number:
            self._world.change.set()

    @ray.method(concurrency_group=CONTROL)
    def disconnect(self, number: int) -> None:
        """End every wait of run `number` for other ranks at once, with an error."""
        if self._world and self._run == number:
            self._world.close()
