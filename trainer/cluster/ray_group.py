"""Data-parallel workers as Ray actors: started together, monitored, replaced when lost."""

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
from ray.exceptions import (
    GetTimeoutError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from trainer.cluster.connection import RayConnection
from trainer.cluster.group import (
    Failure,
    InsufficientResources,
    WorkerFailed,
    WorkerFunction,
)
from trainer.cluster.heartbeat import POLL_INTERVAL_S, HeartbeatMonitor, HeartbeatStatus
from trainer.cluster.placement import Placement
from trainer.config import ClusterConfig
from trainer.errors import ConfigError, RunError, first_line

ROOT_CAUSE_WAIT_S = 1.0  # how long to wait for the root cause after a rank lost a peer
IDLE_WAIT_S = 5.0  # how long a worker may take to return from a failed function
COLLECTIVE_FACTOR = 2.0  # timeout of collectives / hang_timeout_s: the monitor must be faster
START_WAIT_S = 300.0  # how long a worker may take to start and import torch

_END = object()


@dataclass
class _Rank:
    """What the driver knows about one worker."""

    actor: Any
    node: str = ""  # host name
    node_id: str = ""
    pid: int = 0


class RayGroup:
    """See `WorkerGroup`."""

    def __init__(self, cfg: ClusterConfig) -> None:
        self.size = cfg.workers
        self.stop_requested = threading.Event()
        self._cfg = cfg
        self._connection = RayConnection(cfg)
        self._placement = Placement(cfg)
        self._ranks: list[_Rank] = []
        self._runs = 0
        self._head_lost = False  # as far as reported

    @property
    def nodes(self) -> list[str]:
        """Host name of each rank."""
        return [rank.node for rank in self._ranks]

    def start(self) -> None:
        """Connect to Ray, reserve resources for all workers, start them, connect them."""
        self._connection.open()
        self._check_stop()
        self._placement.reserve(self._check_stop)
        self._ranks = [_Rank(self._new_actor(rank)) for rank in range(self.size)]
        self._wait_until_up()
        if self._placement.device == "cuda" and self._ranks_without_gpu():
            self._placement.device = self._placement.without_cuda(
                "torch sees no GPU on some worker's node"
            )
        self._connect()

    def restart(self) -> None:
        """Replace the lost workers; the others stay warm."""
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
        self._wait_until_up()
        if self._placement.device == "cuda" and (blind := self._ranks_without_gpu()):
            lost = blind[0]
            raise InsufficientResources(
                f"worker {lost} on {self.nodes[lost]}: torch sees no GPU there any more"
            )
        self._connect()

    def alive(self) -> bool:
        """Ask every worker; also False while a lost node is not yet known to be lost."""
        try:
            self._on_all("identity", timeout_s=IDLE_WAIT_S)
        except RayError:
            return False
        return True

    def run(self, function: WorkerFunction, *args: Any) -> Iterator[Any]:
        """Yield what rank 0 yields; the first failure ends the run."""
        if not self._ranks:
            raise RuntimeError("start() the group before run()")
        self._runs += 1
        shared = [_put(value) for value in (function, *args)]
        streams = {
            rank.actor.run.options(num_returns="streaming").remote(self._runs, *shared): number
            for number, rank in enumerate(self._ranks)
        }
        try:
            yield from self._messages(streams)
        finally:
            if streams:  # the run failed, or the caller closed the iterator
                self._request_stop()

    def _messages(self, streams: dict[Any, int]) -> Iterator[Any]:
        """Yield the messages of all `streams`, which map to ranks, and remove those that end."""
        monitor = HeartbeatMonitor([rank.actor for rank in self._ranks], self._cfg.hang_timeout_s)
        stop_sent = False
        while streams:
            if self._connection.head.lost != self._head_lost:
                self._head_lost = not self._head_lost
                yield self._connection.head.message()
            if self.stop_requested.is_set() and not stop_sent:
                stop_sent = True
                self._request_stop()
            for stream in _ready(streams, POLL_INTERVAL_S):
                message = _receive(stream)
                if message is _END:
                    monitor.finish(streams.pop(stream))
                elif isinstance(message, Failure):
                    late, error = self._find_root_cause(streams[stream], message, streams)
                    yield from late
                    if isinstance(error, WorkerFailed):
                        self._connection.check_head()
                    raise error
                else:
                    yield message
            if (hung := monitor.poll()) is not None:
                self._connection.check_head()
                self._kill(self._ranks[hung])
                raise self._hung(hung, monitor.last_status(hung))

    def _request_stop(self) -> None:
        """End the current function at its next step; rank 0 passes the request on to the others."""
        with contextlib.suppress(RayError):  # the connection may be gone
            self._ranks[0].actor.request_stop.remote(self._runs)

    def stop(self) -> None:
        """Kill the actors, the only reliable way to end a stuck collective; free the resources.

        A private Ray ends its actors itself. It may also be dead, and then would not answer.
        """
        if not self._connection.ends_ray and self._connection.answers():
            with contextlib.suppress(RayError):  # the cluster may be gone
                for rank in self._ranks:
                    ray.kill(rank.actor)
                self._placement.free()
        self._ranks, self._placement = [], Placement(self._cfg)
        self._connection.close()

    def _new_actor(self, rank: int) -> Any:
        from trainer.cluster.worker import CONTROL, Worker  # imports torch, after Ray has started

        bundle = self._placement.bundle
        threads = self._cfg.threads or max(1, int(self._cfg.cpus_per_worker))
        paths = [os.getcwd(), *sys.path] if self._connection.private else []
        assert self._placement.group is not None
        return (
            ray.remote(concurrency_groups={CONTROL: 1})(Worker)  # type: ignore[call-overload]
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement.group, rank),
            )
            .remote(rank, self.size, threads, self._cfg.nice, paths)
        )

    def _wait_until_up(self) -> None:
        """Wait until every worker is up, and record its identity."""
        answers = [rank.actor.identity.remote() for rank in self._ranks]
        deadline = time.monotonic() + START_WAIT_S
        waiting = answers
        with _startup_errors():
            while waiting:
                up, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_INTERVAL_S)
                ray.get(up)  # raises where one has died
                self._check_stop()
                self._placement.keep(self._check_stop)
                if time.monotonic() > deadline:
                    raise GetTimeoutError(f"they are not up after {START_WAIT_S:g} s")
            for rank, identity in zip(self._ranks, ray.get(answers), strict=True):
                rank.node, rank.node_id, rank.pid = identity

    def _connect(self) -> None:
        """Connect the workers with one another in a new group."""
        timeout_s = COLLECTIVE_FACTOR * self._cfg.hang_timeout_s
        with _startup_errors():
            loopback = "127.0.0.1" if self._connection.private else None
            rendezvous = ray.get(self._ranks[0].actor.listen.remote(loopback))
            self._on_all("connect", *rendezvous, self._placement.device, timeout_s)

    def _ranks_without_gpu(self) -> list[int]:
        """The ranks in whose process torch sees no GPU."""
        with _startup_errors():
            return [rank for rank, sees in enumerate(self._on_all("sees_cuda")) if not sees]

    def _on_all(self, method: str, *args: Any, timeout_s: float = START_WAIT_S) -> list[Any]:
        """Call a method on every worker at once and wait for all answers."""
        answers = [getattr(rank.actor, method).remote(*args) for rank in self._ranks]
        return list(ray.get(answers, timeout=timeout_s))

    def _check_stop(self) -> None:
        if self.stop_requested.is_set():
            raise RunError("the group was asked to stop before it had started")

    def _kill(self, rank: _Rank) -> None:
        """End a worker even if its process is suspended and cannot handle requests."""
        ray.kill(rank.actor)
        if not rank.pid:  # it never started
            return
        if rank.node_id == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(OSError):  # it has ended
                os.kill(rank.pid, signal.SIGKILL)
            return
        on_its_node = NodeAffinitySchedulingStrategy(rank.node_id, soft=False)
        _kill_process.options(scheduling_strategy=on_its_node).remote(rank.pid)

    def _hung(self, rank: int, last: HeartbeatStatus | None) -> WorkerFailed:
        reason = f"no progress for cluster.hang_timeout_s={self._cfg.hang_timeout_s:g}"
        detail = f"last seen {last.where}" if last else "no heartbeat was received before"
        position = last.position if last else None
        return WorkerFailed(rank, self.nodes[rank], f"{reason}; {detail}", detail, position)

    def _kill_if_unusable(self, rank: int, failure: Failure) -> None:
        """End a worker that cannot be reused after its failure."""
        if failure.makes_worker_unusable(self._placement.device):
            ray.kill(self._ranks[rank].actor)

    def _find_root_cause(
        self, rank: int, failure: Failure, streams: Mapping[Any, int]
    ) -> tuple[list[Any], Exception]:
        """Find the error to raise after the first failure.

        If the failure only says that a peer was lost, wait briefly for the failure of the peer.

        Returns:
            Messages of rank 0 that arrived in the meantime, and the error.
        """
        self._kill_if_unusable(rank, failure)
        late = []
        deadline = time.monotonic() + ROOT_CAUSE_WAIT_S
        waiting = {stream: r for stream, r in streams.items() if r != rank}
        while waiting:
            left = max(0, deadline - time.monotonic()) if failure.is_peer_loss else 0
            ready = _ready(waiting, left)
            for stream in ready:
                message = _receive(stream)
                if message is _END:
                    del waiting[stream]
                elif not isinstance(message, Failure):
                    late.append(message)
                else:
                    other = waiting.pop(stream)
                    self._kill_if_unusable(other, message)
                    if failure.is_peer_loss and not message.is_peer_loss:
                        rank, failure = other, message
            if not ready:
                break
        if failure.is_config_error:
            return late, ConfigError(failure.reason)
        if failure.is_permanent:
            return late, RunError(failure.reason, failure.detail)
        node = self.nodes[rank]
        return late, WorkerFailed(rank, node, failure.reason, failure.detail, failure.position)


@ray.remote(num_cpus=0)
def _kill_process(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _startup_errors() -> Iterator[None]:
    """Convert Ray's errors at the start of workers to a RunError."""
    try:
        yield
    except RayError as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise RunError(f"the workers did not start: {last}", str(error)) from error


def _put(value: Any) -> Any:
    """Store a value for the workers. Raises ConfigError if it cannot be pickled."""
    try:
        return ray.put(value)
    except RayError:
        raise
    except Exception as error:
        cause = first_line(error.__cause__ or error)
        raise ConfigError(
            f"a {type(value).__name__} cannot be sent to the workers: {cause}; "
            "make it picklable, or set cluster.backend=inline"
        ) from error


def _died(answer: Any) -> bool:
    """Whether an actor died before it could answer."""
    try:
        ray.get(answer)
    except RayActorError:
        return True
    return False


def _ready(streams: Mapping[Any, int], timeout: float) -> list[Any]:
    """The streams that have a message, after waiting for the first of them."""
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
    except RayTaskError as error:
        return _transfer_failure(error)
    except RayError as error:
        return Failure(type(error).__name__, str(error))


def _transfer_failure(error: RayTaskError) -> Failure:
    """The failure of a worker to load an argument or to send a message.

    Exceptions of the function itself arrive as messages, so nothing else raises RayTaskError.
    """
    if not isinstance(error.cause, RaySystemError):
        return Failure(f"a message cannot be sent: {error.cause}", str(error), is_permanent=True)
    cause = first_line(error.cause).removeprefix("System error: ")
    reason = f"an argument cannot be loaded: {cause}"
    if "No module named" in cause:
        reason += "; cluster.working_dir or cluster.py_modules sends your code to the workers"
    return Failure(reason, str(error), is_permanent=True)
