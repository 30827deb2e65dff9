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
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from trainer.cluster.group import Body, Failure, WorkerFailed
from trainer.cluster.session import RaySession
from trainer.cluster.watch import Watch
from trainer.config import ClusterConfig
from trainer.errors import ConfigError, RunError

ROOT_CAUSE_WAIT_S = 1.0  # how long others may still report when one says that a peer went away
LOOK_EVERY_S = 0.5  # between two looks at signals and signs of life
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
        self._placement: PlacementGroup | None = None
        self._device = "cpu"
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
        self._device = self._choose_device()
        self._placement = self._reserve(self._bundle())
        self._ranks = [_Rank(self._new_actor(rank)) for rank in range(self.size)]
        self._connect()

    def restart(self) -> None:
        """Replace the workers that are lost; the others stay warm."""
        idle = [rank.actor.identity.remote() for rank in self._ranks]
        deadline = time.monotonic() + IDLE_WAIT_S
        for number, (rank, ref) in enumerate(zip(self._ranks, idle, strict=True)):
            try:
                ray.get(ref, timeout=max(0, deadline - time.monotonic()))
            except (RayActorError, GetTimeoutError):
                self._kill(rank)
                self._ranks[number] = _Rank(self._new_actor(number))
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
        watch = _Signs([rank.actor for rank in self._ranks], self._cfg.hang_timeout_s)
        told_to_stop = False
        while streams:
            if self.stop_asked.is_set() and not told_to_stop:
                told_to_stop = True
                self._ranks[0].actor.stop_soon.remote(self._runs)
            for stream in _ready(streams, LOOK_EVERY_S):
                message = _receive(stream)
                if message is _END:
                    del streams[stream]
                elif isinstance(message, Failure):
                    late, error = self._aftermath(streams[stream], message, streams)
                    yield from late
                    raise error
                else:
                    yield message
            if (hung := watch.look()) is not None:
                place = watch.place(hung)
                reason = f"no sign of life for cluster.hang_timeout_s={self._cfg.hang_timeout_s:g}"
                detail = f"it was last heard of in phase, step {place}"
                self._kill(self._ranks[hung])
                raise WorkerFailed(hung, self.nodes[hung], f"{reason}; {detail}", detail, place)

    def stop(self) -> None:
        """Kill the actors (the only sure way out of a stuck collective), free their room.

        A private Ray takes its actors along when it ends; it may have been killed itself, and then
        would not answer.
        """
        if self._placement and not self._session.ends_ray:
            with contextlib.suppress(RayError):  # the cluster may be gone
                for rank in self._ranks:
                    ray.kill(rank.actor)
                remove_placement_group(self._placement)
        self._ranks, self._placement = [], None
        self._session.close()

    def _new_actor(self, rank: int) -> Any:
        from trainer.cluster.worker import CONTROL, Worker  # imports torch: Ray starts before that

        bundle = self._bundle()
        threads = self._cfg.threads or max(1, int(self._cfg.cpus_per_worker))
        paths = [os.getcwd(), *sys.path] if self._session.private else []
        assert self._placement is not None
        return (
            ray.remote(concurrency_groups={CONTROL: 1})(Worker)  # type: ignore[call-overload]
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, rank),
            )
            .remote(rank, self.size, threads, self._cfg.nice, paths)
        )

    def _connect(self) -> None:
        """Learn who the workers are, and let them meet."""
        timeout_s = COLLECTIVE_FACTOR * self._cfg.hang_timeout_s
        try:
            identities = self._on_all("identity")
            for rank, identity in zip(self._ranks, identities, strict=True):
                rank.node, rank.node_id, rank.pid = identity
            loopback = "127.0.0.1" if self._session.private else None
            host, port = ray.get(self._ranks[0].actor.listen.remote(loopback, timeout_s))
            if self._device == "cuda" and not all(self._on_all("sees_cuda")):
                self._device = self._without_cuda("torch sees no GPU on some worker's node")
            self._on_all("connect", host, port, self._device, timeout_s)
        except RayError as error:
            last = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise RunError(f"the workers did not start: {last}", str(error)) from error

    def _on_all(self, method: str, *args: Any, timeout_s: float = START_WAIT_S) -> list[Any]:
        """Call a method on every worker at once and wait for all answers."""
        answers = [getattr(rank.actor, method).remote(*args) for rank in self._ranks]
        return list(ray.get(answers, timeout=timeout_s))

    def _without_cuda(self, reason: str) -> str:
        """cpu, unless CUDA is insisted on: then a ConfigError."""
        if self._cfg.device == "cuda":
            raise ConfigError(
                f"cluster.device=cuda: {reason}; use fewer workers or cluster.device=cpu"
            )
        return "cpu"

    def _bundle(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        bundle = {"CPU": self._cfg.cpus_per_worker}
        if self._device == "cuda":
            bundle["GPU"] = self._cfg.gpus_per_worker
        return bundle

    def _choose_device(self) -> str:
        """cpu or cuda. Raises ConfigError where CUDA is asked for and the cluster lacks it."""
        if self._cfg.device == "cpu":
            return "cpu"
        wanted = self._cfg.workers * self._cfg.gpus_per_worker
        found = ray.cluster_resources().get("GPU", 0)
        if found < wanted:
            return self._without_cuda(
                f"{wanted:g} GPUs are needed (cluster.workers={self._cfg.workers} x "
                f"cluster.gpus_per_worker={self._cfg.gpus_per_worker:g}), {found:g} found"
            )
        if self.size > 1 and self._cfg.gpus_per_worker < 1:
            return self._without_cuda("NCCL takes one GPU per rank")
        return "cuda"

    def _reserve(self, bundle: dict[str, float]) -> PlacementGroup:
        """Wait for one placement group that holds every worker."""
        placement: PlacementGroup = placement_group([bundle] * self.size, strategy="PACK")
        deadline = time.monotonic() + self._cfg.start_timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if placement.wait(min(left, LOOK_EVERY_S)):
                return placement
            if self.stop_asked.is_set():
                break
        remove_placement_group(placement)
        self._heed_stop()
        total, free = ray.cluster_resources(), ray.available_resources()
        missing = "; ".join(
            f"{amount * self.size:g} {kind} needed, {free.get(kind, 0):g} of "
            f"{total.get(kind, 0):g} free"
            for kind, amount in bundle.items()
        )
        message = (
            f"no room for cluster.workers={self.size} within cluster.start_timeout_s="
            f"{self._cfg.start_timeout_s:g}: {missing}"
        )
        if any(amount * self.size > total.get(kind, 0) for kind, amount in bundle.items()):
            raise ConfigError(message)
        raise RunError(message)

    def _heed_stop(self) -> None:
        if self.stop_asked.is_set():
            raise RunError("the group was asked to stop before it had started")

    def _kill(self, rank: _Rank) -> None:
        """End a worker that may not be able to end itself: a stopped process hears no request."""
        ray.kill(rank.actor)
        if rank.pid:
            on_its_node = NodeAffinitySchedulingStrategy(rank.node_id, soft=False)
            _kill_process.options(scheduling_strategy=on_its_node).remote(rank.pid)

    def _aftermath(
        self, rank: int, failure: Failure, streams: Mapping[Any, int]
    ) -> tuple[list[Any], Exception]:
        """After the first failure: what rank 0 had already said, and the error to raise.

        Where the failure only says that a peer went away, the others get a moment to say why.
        """
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
                elif failure.peer and not message.peer:
                    rank, failure = waiting.pop(stream), message
                else:
                    del waiting[stream]
            if not ready:
                break
        if failure.wrong_config:
            return late, ConfigError(failure.reason)
        if failure.final:
            return late, RunError(failure.reason, failure.detail)
        node = self.nodes[rank]
        return late, WorkerFailed(rank, node, failure.reason, failure.detail, failure.place)


class _Signs:
    """Asks every worker for signs of life, and has them watched."""

    def __init__(self, actors: list[Any], timeout_s: float) -> None:
        self._actors = actors
        self._watch = Watch(len(actors), timeout_s, time.monotonic())
        self._asked: dict[Any, int] = {}

    def look(self) -> int | None:
        """Take in what was answered, ask again, and say which rank hangs, if any."""
        if self._asked:
            for ref in _ready(self._asked, 0):
                rank = self._asked.pop(ref)
                sign = _receive(iter([ref]))
                if not isinstance(sign, Failure) and sign is not None:
                    self._watch.heard(rank, sign, time.monotonic())
        for rank in set(range(len(self._actors))) - set(self._asked.values()):
            self._asked[self._actors[rank].sign.remote()] = rank
        return self._watch.hung(time.monotonic())

    def place(self, rank: int) -> tuple[int, int] | None:
        """Phase and step at which `rank` was when last heard of."""
        return self._watch.place(rank)


@ray.remote(num_cpus=0)
def _kill_process(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


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
