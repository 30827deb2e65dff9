"""Data-parallel workers as Ray actors: started as a gang, watched, replaced when lost."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from trainer.cluster.group import Body, Failure, NoRoom, WorkerFailed
from trainer.cluster.placement import Room
from trainer.cluster.session import RaySession
from trainer.cluster.signs import LOOK_EVERY_S, Signs
from trainer.cluster.watch import Sign
from trainer.config import ClusterConfig
from trainer.errors import ConfigError, RunError

ROOT_CAUSE_WAIT_S = 1.0  # how long others may still report when one says that a peer went away
IDLE_WAIT_S = 5.0  # how long a worker may take to come back from a failed body
COLLECTIVE_FACTOR = 2.0  # collectives time out later than the watch, which knows whose fault it is

START_WAIT_S = 300.0  # how long a worker may take to start and import torch

_END = object()


@dataclass
class _Rank:
    """One worker as the driver knows it."""

    actor: Any
    node: str = ""  # host name
    node_id: str = ""
    pid: int = 0


class RayGroup:
    """See `WorkerGroup`."""

    def __init__(self, cfg: ClusterConfig) -> None:
        self.size = cfg.workers
        self.stop_asked = threading.Event()
        self._cfg = cfg
        self._session = RaySession(cfg)
        self._room = Room(cfg)
        self._ranks: list[_Rank] = []
        self._runs = 0

    @property
    def nodes(self) -> list[str]:
        """Host name of each rank."""
        return [rank.node for rank in self._ranks]

    def start(self) -> None:
        """Connect to Ray, reserve room for all workers at once, start them, connect them."""
        self._session.open()
        self._heed_stop()
        self._room.reserve(self._heed_stop)
        self._ranks = [_Rank(self._new_actor(rank)) for rank in range(self.size)]
        self._meet()
        if self._room.device == "cuda" and self._blind():
            self._room.device = self._room.without_cuda("torch sees no GPU on some worker's node")
        self._connect()

    def restart(self) -> None:
        """Replace the workers that are lost; the others stay warm."""
        idle = {rank.actor.identity.remote(): number for number, rank in enumerate(self._ranks)}
        deadline = time.monotonic() + IDLE_WAIT_S
        while idle:
            answered, silent = ray.wait(list(idle), timeout=max(0, deadline - time.monotonic()))
            for ref in answered or silent:
                number = idle.pop(ref)
                if not answered:
                    self._kill(self._ranks[number])
                elif not _died(ref):
                    continue
                self._ranks[number] = _Rank(self._new_actor(number))
        self._meet()
        if self._room.device == "cuda" and (blind := self._blind()):
            lost = blind[0]
            raise NoRoom(f"worker {lost} on {self.nodes[lost]}: torch sees no GPU there any more")
        self._connect()

    def alive(self) -> bool:
        """Ask every worker; also false where a node takes long to be known as lost."""
        try:
            self._on_all("identity", timeout_s=IDLE_WAIT_S)
        except RayError:
            return False
        return True

    def run(self, body: Body, *args: Any) -> Iterator[Any]:
        """Stream what rank 0 yields; the first failure ends the gang."""
        if not self._ranks:
            raise RuntimeError("start() the group before run()")
        self._runs += 1
        shared = [ray.put(arg) for arg in args]
        streams = {
            rank.actor.run.options(num_returns="streaming").remote(self._runs, body, *shared): i
            for i, rank in enumerate(self._ranks)
        }
        watch = Signs([rank.actor for rank in self._ranks], self._cfg.hang_timeout_s)
        told_to_stop = False
        while streams:
            if self.stop_asked.is_set() and not told_to_stop:
                told_to_stop = True
                self._ranks[0].actor.stop_soon.remote(self._runs)
            for stream in _ready(streams, LOOK_EVERY_S):
                message = _receive(stream)
                if message is _END:
                    watch.ended(streams.pop(stream))
                elif isinstance(message, Failure):
                    late, error = self._aftermath(streams[stream], message, streams)
                    yield from late
                    raise error
                else:
                    yield message
            if (hung := watch.look()) is not None:
                self._kill(self._ranks[hung])
                raise self._hung(hung, watch.last(hung))

    def stop(self) -> None:
        """Kill the actors (the only sure way out of a stuck collective), free their room.

        A private Ray takes its actors along when it ends; it may have been killed itself, and then
        would not answer.
        """
        if not self._session.ends_ray:
            with contextlib.suppress(RayError):  # the cluster may be gone
                for rank in self._ranks:
                    ray.kill(rank.actor)
                self._room.free()
        self._ranks, self._room = [], Room(self._cfg)
        self._session.close()

    def _new_actor(self, rank: int) -> Any:
        from trainer.cluster.worker import CONTROL, Worker  # imports torch: Ray starts before that

        bundle = self._room.bundle
        threads = self._cfg.threads or max(1, int(self._cfg.cpus_per_worker))
        paths = [os.getcwd(), *sys.path] if self._session.private else []
        assert self._room.group is not None
        return (
            ray.remote(concurrency_groups={CONTROL: 1})(Worker)  # type: ignore[call-overload]
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._room.group, rank),
            )
            .remote(rank, self.size, threads, self._cfg.nice, paths)
        )

    def _meet(self) -> None:
        """Wait until every worker is up, and learn who it is."""
        answers = [rank.actor.identity.remote() for rank in self._ranks]
        deadline = time.monotonic() + START_WAIT_S
        waiting = answers
        with _told_at_start():
            while waiting:
                up, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_EVERY_S)
                ray.get(up)  # raises where one has died
                self._heed_stop()
                self._room.keep(self._heed_stop)
                if time.monotonic() > deadline:
                    raise GetTimeoutError(f"they are not up after {START_WAIT_S:g} s")
            for rank, identity in zip(self._ranks, ray.get(answers), strict=True):
                rank.node, rank.node_id, rank.pid = identity

    def _connect(self) -> None:
        """Let the workers find one another, in a new group."""
        timeout_s = COLLECTIVE_FACTOR * self._cfg.hang_timeout_s
        with _told_at_start():
            loopback = "127.0.0.1" if self._session.private else None
            host, port = ray.get(self._ranks[0].actor.listen.remote(loopback, timeout_s))
            self._on_all("connect", host, port, self._room.device, timeout_s)

    def _blind(self) -> list[int]:
        """The ranks whose torch sees no GPU."""
        with _told_at_start():
            return [rank for rank, sees in enumerate(self._on_all("sees_cuda")) if not sees]

    def _on_all(self, method: str, *args: Any, timeout_s: float = START_WAIT_S) -> list[Any]:
        """Call a method on every worker at once and wait for all answers."""
        answers = [getattr(rank.actor, method).remote(*args) for rank in self._ranks]
        return list(ray.get(answers, timeout=timeout_s))

    def _heed_stop(self) -> None:
        if self.stop_asked.is_set():
            raise RunError("the group was asked to stop before it had started")

    def _kill(self, rank: _Rank) -> None:
        """End a worker that may not be able to end itself: a stopped process hears no request."""
        ray.kill(rank.actor)
        if not rank.pid:  # it never came up
            return
        if rank.node_id == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(OSError):  # it is gone
                os.kill(rank.pid, signal.SIGKILL)
            return
        on_its_node = NodeAffinitySchedulingStrategy(rank.node_id, soft=False)
        _kill_process.options(scheduling_strategy=on_its_node).remote(rank.pid)

    def _hung(self, rank: int, last: Sign | None) -> WorkerFailed:
        reason = f"no sign of life for cluster.hang_timeout_s={self._cfg.hang_timeout_s:g}"
        detail = f"last heard of {last.where}" if last else "it had not been heard of before"
        place = last.place if last else None
        return WorkerFailed(rank, self.nodes[rank], f"{reason}; {detail}", detail, place)

    def _drop_spoilt(self, rank: int, failure: Failure) -> None:
        """End a worker that must not be kept warm after its failure."""
        if failure.spoils(self._room.device):
            ray.kill(self._ranks[rank].actor)

    def _aftermath(
        self, rank: int, failure: Failure, streams: Mapping[Any, int]
    ) -> tuple[list[Any], Exception]:
        """After the first failure: what rank 0 had already said, and the error to raise.

        Where the failure only says that a peer went away, the others get a moment to say why.
        """
        self._drop_spoilt(rank, failure)
        late = []
        deadline = time.monotonic() + ROOT_CAUSE_WAIT_S
        waiting = {stream: r for stream, r in streams.items() if r != rank}
        while waiting:
            left = max(0, deadline - time.monotonic()) if failure.peer else 0
            ready = _ready(waiting, left)
            for stream in ready:
                message = _receive(stream)
                if message is _END:
                    del waiting[stream]
                elif not isinstance(message, Failure):
                    late.append(message)
                else:
                    other = waiting.pop(stream)
                    self._drop_spoilt(other, message)
                    if failure.peer and not message.peer:
                        rank, failure = other, message
            if not ready:
                break
        if failure.wrong_config:
            return late, ConfigError(failure.reason)
        if failure.final:
            return late, RunError(failure.reason, failure.detail)
        node = self.nodes[rank]
        return late, WorkerFailed(rank, node, failure.reason, failure.detail, failure.place)


@ray.remote(num_cpus=0)
def _kill_process(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _told_at_start() -> Iterator[None]:
    """Make a RunError of what Ray says when workers do not start."""
    try:
        yield
    except RayError as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise RunError(f"the workers did not start: {last}", str(error)) from error


def _died(answer: Any) -> bool:
    """Whether an actor died before it could give this answer."""
    try:
        ray.get(answer)
    except RayActorError:
        return True
    return False


def _ready(streams: Mapping[Any, int], timeout: float) -> list[Any]:
    """The streams that have something to say, after waiting for the first of them."""
    ready, _ = ray.wait(list(streams), timeout=timeout, fetch_local=False)
    return ready


def _receive(stream: Any) -> Any:
    """The next message of a stream: a Failure where the worker died, _END at the end."""
    try:
        return ray.get(next(stream))
    except StopIteration:
        return _END
    except RayActorError as error:
        return Failure("the process died", str(error))
    except RayError as error:
        return Failure(type(error).__name__, str(error))
