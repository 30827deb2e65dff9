"""Data-parallel workers as Ray actors: started together, monitored, replaced when lost."""

import contextlib
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from trainer.cluster.connect import broken_links, request_connect, wait_connected
from trainer.cluster.connection import RayConnection
from trainer.cluster.environment import available_cpus, too_few_cpus
from trainer.cluster.group import (
    Failure,
    InsufficientResources,
    Reformed,
    Step,
    WorkerFailed,
    WorkerFunction,
)
from trainer.cluster.heartbeat import POLL_INTERVAL_S, HeartbeatMonitor, HeartbeatStatus
from trainer.cluster.nodes import alive_nodes, lost_nodes
from trainer.cluster.placement import Placement
from trainer.cluster.rank import Rank, request_worker
from trainer.cluster.root_cause import find_root_cause, host_is_gone
from trainer.cluster.streams import END, died, put, ready, receive, startup_errors
from trainer.config import ClusterConfig
from trainer.errors import ConfigError, RunError

SUSPECT_WAIT_S = 1.0  # how long a worker that others have lost may take to answer at all
IDLE_WAIT_S = 5.0  # how long a worker may take to return from a failed function
COLLECTIVE_FACTOR = 2.0  # timeout of collectives / hang_timeout_s: the monitor must be faster
START_WAIT_S = 300.0  # how long a worker may take to start and import torch


class RayGroup:
    """See `WorkerGroup`. The number of workers is fixed; trainer.cluster.elastic varies it."""

    busy_wait_s = IDLE_WAIT_S  # how long a worker may take to return if its heartbeat answers
    root_cause_wait_s = 1.0  # how long to wait for the root cause after a rank lost a peer

    def __init__(self, cfg: ClusterConfig) -> None:
        self.stop_requested = threading.Event()
        self._cfg = cfg
        self._connection = RayConnection(cfg)
        self._placement = Placement(cfg)
        self._ranks: list[Rank] = []
        self._idle: list[Rank] = []  # workers that are not in the current group
        self._runs = 0  # number of the current or last run
        self._suspects: set[int] = set()  # ranks that others have lost in the last run
        self.streams: dict[Any, int] = {}  # of the current run's messages -> rank
        self._head_lost = False  # as far as reported
        self._moves: list[str] = []  # why workers started on other hosts

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self._ranks) or self._cfg.workers

    @property
    def nodes(self) -> list[str]:
        """Host name of each rank."""
        return [rank.node for rank in self._ranks]

    @property
    def notices(self) -> list[str]:
        """See `WorkerGroup`."""
        lines = [self._placement.notice] if self._placement.notice else []
        if self._connection.private and self._placement.device == "cpu":
            crowded = too_few_cpus(self._cfg, available_cpus())
            lines += [crowded] if crowded else []
        return lines + self._moves

    def start(self) -> None:
        """Connect to Ray, reserve resources for all workers, start them, connect them."""
        self._connection.open()
        self._check_stop()
        self._placement.reserve(self._check_stop)
        self._ranks = [self._new_rank(rank) for rank in range(self.size)]
        self._wait_until_up()
        if self._placement.device == "cuda" and self._ranks_without_gpu():
            self._placement.device = self._placement.without_cuda(
                "torch sees no GPU on some worker's node"
            )
        self._connect()

    def restart(self) -> None:
        """Replace the lost workers; the others stay warm, unless all have to move."""
        self._connection.check_head()
        idle = self._end_lost("identity")
        lost = [number for number in range(self.size) if number not in idle]
        hosts = {self._ranks[number].node_id: self._ranks[number].node for number in lost}
        hosts |= self._placement.lost  # by an earlier restart: they may answer again
        gone = lost_nodes(hosts)
        self._placement.lost = {node_id: hosts[node_id] for node_id in gone}
        if gone & alive_nodes().keys() and self._placement.fits():
            self._move(f"{' and '.join(self._placement.lost.values())} lost")
        else:  # Ray itself moves what it has reserved on a host, as soon as it knows of the loss
            for number in lost:
                self._ranks[number] = self._new_rank(number)
        self._wait_until_up()
        if self._placement.device == "cuda" and (blind := self._ranks_without_gpu()):
            raise InsufficientResources(
                f"worker {blind[0]} on {self.nodes[blind[0]]}: torch sees no GPU there any more"
            )
        self._connect()

    def reform(self, size: int | None = None, source: int | None = None) -> Reformed:
        """Repeat a recorded change: connect the first `size` workers, `source` as rank 0."""
        workers = [*self._ranks, *self._idle]
        source = source or 0
        workers.insert(0, workers.pop(source))
        kept = ray.get([worker.actor.kept.remote() for worker in workers], timeout=IDLE_WAIT_S)
        size = len(workers) if size is None else size
        before, self._ranks, self._idle = self.size, workers[:size], workers[size:]
        self._connect(keep=True)
        left = [f"worker {rank}" for rank in range(size, before)]
        return Reformed(kept[0], source, left, self.nodes[before:])

    def alive(self) -> bool:
        """Ask every worker; also False while a lost node is not yet known to be lost."""
        try:
            self._on_all("identity", timeout_s=IDLE_WAIT_S)
        except RayError:
            return False
        return True

    def run(self, function: WorkerFunction, *args: Any) -> Iterator[Any]:
        """Yield what rank 0 yields; the first failure ends the run."""
        with contextlib.closing(self.steps(function, *args)) as steps:
            for step in steps:
                if step is Step.WAIT:
                    ready(self.streams, POLL_INTERVAL_S)
                elif step is not Step.BLOCK:
                    yield step

    def steps(self, function: WorkerFunction, *args: Any) -> Generator[Any]:
        """See `WorkerGroup`."""
        if not self._ranks:
            raise RuntimeError("start() the group before run()")
        self._runs += 1
        self._suspects = set()
        shared = [put(value) for value in (function, *args)]
        alive = [rank.actor.identity.remote() for rank in self._ranks]  # answered before the run
        self.streams = {
            rank.actor.run.options(num_returns="streaming").remote(self._runs, *shared): number
            for number, rank in enumerate(self._ranks)
        }
        try:
            yield from self._messages()
        except WorkerFailed as error:
            answered, silent = ray.wait(alive, num_returns=len(alive), timeout=0)
            error.had_begun = not silent and not any(died(answer) for answer in answered)
            raise
        finally:
            if self.streams:  # the run failed, or the caller closed the iterator
                self._request_stop()
                self._disconnect()
                self.streams = {}

    def _messages(self) -> Iterator[Any]:
        """Yield the steps of all `streams`, and remove those that end."""
        monitor = HeartbeatMonitor([rank.actor for rank in self._ranks], self._cfg.hang_timeout_s)
        stop_sent = False
        while self.streams:
            if self._connection.head.lost != self._head_lost:
                self._head_lost = not self._head_lost
                yield self._connection.head.message()
            if self.stop_requested.is_set() and not stop_sent:
                stop_sent = True
                self._request_stop()
            self._attend()
            found = ready(self.streams, 0)
            for stream in found:
                message = receive(stream)
                if message is END:
                    monitor.finish(self.streams.pop(stream))
                elif isinstance(message, Failure):
                    yield Step.BLOCK
                    late, error = self._find_root_cause(self.streams[stream], message)
                    yield from late
                    if isinstance(error, WorkerFailed):
                        self._connection.check_head()
                    raise error
                else:
                    yield message
            if (hung := monitor.poll()) is not None:
                yield Step.BLOCK
                self._connection.check_head()
                self._ranks[hung].kill()
                raise self._hung(hung, monitor.last_status(hung))
            if not found:
                yield Step.WAIT

    def _request_stop(self) -> None:
        """End the current function at its next step; rank 0 passes the request on to the others."""
        with contextlib.suppress(RayError):  # the connection may be gone
            self._ranks[0].actor.request_stop.remote(self._runs)

    def _attend(self) -> None:
        """Called regularly during a run. Nothing to do if the members are fixed."""

    def _on_silence(self, rank: Rank) -> None:
        """A worker does not answer. Here nothing: `restart` asks the hosts of lost workers."""

    def _disconnect(self) -> None:
        """Let workers whose function has not ended stop waiting for other ranks at once."""
        for rank in self._ranks:
            with contextlib.suppress(RayError):
                rank.actor.disconnect.remote(self._runs)

    def stop(self) -> None:
        """Kill the actors, the only reliable way to end a stuck collective; free the resources.

        A private Ray ends its actors itself. It may also be dead, and then would not answer.
        """
        if not self._connection.ends_ray and self._connection.answers():
            with contextlib.suppress(RayError):  # the cluster may be gone
                for actor in self._actors():
                    ray.kill(actor)
                self._placement.free()
        self._ranks, self._idle, self._placement = [], [], Placement(self._cfg)
        self._connection.close()

    def _actors(self) -> list[Any]:
        """Every worker that may be alive."""
        return [rank.actor for rank in (*self._ranks, *self._idle)]

    def _new_actor(self, rank: int | None) -> Any:
        """Request a worker.

        Args:
            rank: its index in the placement group; None: on any host with free resources.
        """
        strategy: Any = "DEFAULT"
        if rank is not None:
            assert self._placement.group is not None
            strategy = PlacementGroupSchedulingStrategy(self._placement.group, rank)
            selector = None  # its resources are reserved
        else:
            selector = self._placement.selector()
        bundle = self._placement.bundle
        return request_worker(self._cfg, bundle, strategy, selector, self._connection.private)

    def _new_rank(self, rank: int) -> Rank:
        """Request the worker of a rank; it starts where its resources are reserved."""
        host = self._placement.host_of(rank)  # first, as Ray may move it meanwhile
        return Rank(self._new_actor(rank), node_id=host)

    def _end_lost(self, method: str) -> dict[int, Any]:
        """Ask all workers, whose function has failed, and end those that cannot answer.

        A worker that still executes something, such as storing its state, answers its heartbeat.

        Args:
            method: of the workers, which answer when no function runs.

        Returns:
            The answers by rank; the other workers are lost.
        """
        pending = {
            getattr(r.actor, method).remote(): number for number, r in enumerate(self._ranks)
        }
        beats = {rank.actor.heartbeat.remote(): number for number, rank in enumerate(self._ranks)}
        limits = [SUSPECT_WAIT_S if n in self._suspects else IDLE_WAIT_S for n in range(self.size)]
        answers, begun = {}, time.monotonic()
        while pending:
            until = begun + min(limits[rank] for rank in pending.values())
            refs = [*pending, *beats]
            found, _ = ray.wait(refs, timeout=max(0.0, until - time.monotonic()))
            for ref in found:
                if ref in beats:
                    rank = beats.pop(ref)
                    if not died(ref):
                        limits[rank] = self.busy_wait_s
                    continue
                rank = pending.pop(ref)
                with contextlib.suppress(RayError):  # it has died
                    answers[rank] = ray.get(ref)
            if not found:
                for ref, rank in list(pending.items()):
                    if time.monotonic() - begun >= limits[rank]:
                        self._on_silence(self._ranks[rank])
                        self._ranks[rank].kill()
                        del pending[ref]
        return answers

    def _move(self, reason: str) -> None:
        """Start all workers again, on hosts that the placement does not avoid."""
        self._moves.append(f"{reason}: the workers start on other hosts")
        self._placement.move(self._check_stop)
        self._ranks = [self._new_rank(rank) for rank in range(self.size)]

    def _wait_until_up(self) -> None:
        """Wait until every worker is up, and record its identity.

        A worker whose host was lost before it was up is requested again.
        """
        deadline = time.monotonic() + START_WAIT_S
        waiting = {rank.actor.identity.remote(): number for number, rank in enumerate(self._ranks)}
        with startup_errors():
            while waiting:
                refs = list(waiting)
                up, _ = ray.wait(refs, num_returns=len(refs), timeout=POLL_INTERVAL_S)
                for ref in up:
                    number = waiting.pop(ref)
                    rank = self._ranks[number]
                    try:
                        rank.node, rank.node_id, rank.pid, rank.started = ray.get(ref)
                    except RayActorError:
                        if rank.node_id in alive_nodes():
                            raise
                        rank = self._ranks[number] = self._new_rank(number)
                        waiting[rank.actor.identity.remote()] = number
                self._check_stop()
                self._placement.keep(self._check_stop)
                if time.monotonic() > deadline:
                    raise GetTimeoutError(f"they are not up after {START_WAIT_S:g} s")

    def _connect(self, keep: bool = False) -> None:
        """Connect the workers with one another in a new group.

        If two of their hosts cannot reach each other, all start again without one of the two,
        unless the first worker keeps a state, which would be lost: then it raises RunError.

        Args:
            keep: whether the group may continue from a state that the first worker keeps.
        """
        while True:
            lost, failures = self._try_connect(self._wait_s, keep)
            if not lost and not failures:
                return
            links = self._broken_links(failures)
            if not links or keep:
                if failures:
                    failure = next(iter(failures.values()))
                    raise RunError(f"the workers did not start: {failure.reason}", failure.detail)
                rank = lost[0]
                raise RunError(f"worker {rank} on {self.nodes[rank]} was lost while it connected")
            self._move("; ".join(links))
            self._wait_until_up()

    def _try_connect(self, timeout_s: float, keep: bool) -> tuple[list[int], dict[int, Failure]]:
        """Let the workers form a new group.

        Args:
            timeout_s: how long they may take, in seconds.
            keep: as for `_connect`.

        Returns:
            The ranks that died or do not answer, and the failures of others; neither: it worked.
            After a failure, ranks that still wait for it are none of them.
        """
        host = "127.0.0.1" if self._connection.private else None
        device = self._placement.device
        try:
            pending = request_connect(self._ranks, host, device, timeout_s, self._wait_s, keep)
        except RayError:
            return [0], {}
        lost, failures, waiting = wait_connected(pending, timeout_s)
        return [*lost, *self._silent(waiting)], failures

    def _silent(self, ranks: Iterable[int]) -> list[int]:
        """Those of the ranks whose worker does not answer, whatever it executes."""
        asked = {self._ranks[rank].actor.heartbeat.remote(): rank for rank in ranks}
        if not asked:
            return []
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=IDLE_WAIT_S)
        for ref in silent:
            self._on_silence(self._ranks[asked[ref]])
        return [rank for ref, rank in asked.items() if ref not in answered or died(ref)]

    def _broken_links(self, failures: Mapping[int, Failure]) -> list[str]:
        """Remember the hosts that cannot reach each other, and return them in words.

        Args:
            failures: why ranks could not connect.
        """
        links = broken_links(self._ranks, failures, self._silent)
        self._placement.disconnected(links, keep=self._ranks[0].node_id)
        return [*links.values()]

    @property
    def _wait_s(self) -> float:
        """How long a rank waits for the others in a collective, in seconds."""
        return COLLECTIVE_FACTOR * self._cfg.hang_timeout_s

    def _ranks_without_gpu(self) -> list[int]:
        """The ranks in whose process torch sees no GPU."""
        with startup_errors():
            return [rank for rank, sees in enumerate(self._on_all("sees_cuda")) if not sees]

    def _on_all(self, method: str, *args: Any, timeout_s: float = START_WAIT_S) -> list[Any]:
        """Call a method on every worker at once and wait for all answers."""
        answers = [getattr(rank.actor, method).remote(*args) for rank in self._ranks]
        return list(ray.get(answers, timeout=timeout_s))

    def _check_stop(self) -> None:
        if self.stop_requested.is_set():
            raise RunError("the group was asked to stop before it had started")

    def _hung(self, rank: int, last: HeartbeatStatus | None) -> WorkerFailed:
        reason = f"no progress for cluster.hang_timeout_s={self._cfg.hang_timeout_s:g}"
        detail = f"last seen {last.where}" if last else "no heartbeat was received before"
        position = last.position if last else None
        if has_left := bool(lost_nodes([self._ranks[rank].node_id])):
            self._on_silence(self._ranks[rank])
        reason = f"{reason}; {detail}"
        return WorkerFailed(rank, self.nodes[rank], reason, detail, position, has_left)

    def _find_root_cause(self, rank: int, failure: Failure) -> tuple[list[Any], Exception]:
        """Find the error to raise after the first failure. Ends workers that cannot be reused.

        Returns:
            Messages of rank 0 that arrived in the meantime, and the error.
        """
        found = find_root_cause(rank, failure, self.streams, self.root_cause_wait_s)
        for number, each in found.failures.items():
            self._suspect(number, each)
            if each.makes_worker_unusable(self._placement.device):
                ray.kill(self._ranks[number].actor)
        rank, failure = found.rank, found.failure
        if failure.is_config_error:
            return found.late, ConfigError(failure.reason)
        if failure.is_permanent:
            return found.late, RunError(failure.reason, failure.detail)
        has_left = failure.has_left or self._has_left(rank, found.reported)
        return found.late, WorkerFailed(
            rank, self.nodes[rank], failure.reason, failure.detail, failure.position, has_left
        )

    def _suspect(self, rank: int, failure: Failure) -> None:
        """Remember which worker a failure is about: it may be unable to answer."""
        if not failure.is_peer_loss:
            self._suspects.add(rank)
        elif failure.lost_rank is not None:
            self._suspects.add(failure.lost_rank)

    def _has_left(self, rank: int, reported: Failure | None) -> bool:
        """Whether the host of a worker has left the cluster.

        Args:
            rank: of the worker that was lost.
            reported: the failure that the worker itself, or Ray, has reported; None: neither has.
        """
        if reported is not None and not reported.has_died:
            return False  # an exception of a process that is alive
        return self._connection.answers() and host_is_gone(self._ranks[rank].node_id)
