"""The interface of every worker group, and the errors that it raises."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from trainer.cluster.restart import WorkerLoss
from trainer.errors import RunError

WorkerFunction = Callable[..., Iterator[Any]]
"""A function that workers execute: a generator `f(world, *args)`, the same on every rank (SPMD)."""


class Step(Enum):
    """What `WorkerGroup.steps` yields beside messages."""

    WAIT = "no message has arrived; more when Fleet.wait names the group, and at least regularly"
    BLOCK = "the next step may take long: continue in a thread that has nothing else to do"


@dataclass(frozen=True)
class Failure:
    """An exception of a worker function as a message, since exceptions may not be picklable."""

    reason: str
    detail: str  # the traceback, or what is known about the death of the process
    is_config_error: bool = False
    is_permanent: bool = False  # a repetition would fail in the same way
    is_peer_loss: bool = False  # only a consequence: another worker disappeared first
    position: tuple[int, int] | None = None  # phase and step; None: unknown
    lost_rank: int | None = None  # with `is_peer_loss`: the other worker, if it is known
    is_unreachable: bool = False  # no connection to `lost_rank` was possible, nothing refused it
    has_died: bool = False  # the process has died, was told to end, or cannot be reached by Ray
    has_left: bool = False  # the worker's host has left the cluster, or is about to

    def makes_worker_unusable(self, device: str) -> bool:
        """Whether the worker cannot be reused although its process is alive.

        After an error on a GPU, such as a failed assertion in a kernel, every later CUDA call of
        the process fails too. Such errors cannot be distinguished from others, so every error that
        does not come from this package counts as one.
        """
        expected = self.is_config_error or self.is_permanent or self.is_peer_loss
        return device == "cuda" and not expected


class InsufficientResources(RunError):
    """The cluster has no free resources for the workers within `cluster.start_timeout_s`."""


class ClusterLost(RunError):
    """The head node of the Ray cluster does not answer, so that no worker can be replaced."""

    def __init__(self, address: str) -> None:
        super().__init__(f"the head node of the Ray cluster at {address} does not answer")


class WorkerFailed(RunError):
    """A worker raised an exception, died or hung.

    Attributes:
        rank: the worker's rank.
        node: the name of its host.
        detail: its whole traceback, or what is known about its death.
        has_left: whether its host has left the cluster, so that no restart is used up.
        had_begun: whether all workers were alive when the function began.
        loss: the data on which the decision to restart is based (trainer.cluster.restart).
    """

    def __init__(
        self,
        rank: int,
        node: str,
        reason: str,
        detail: str,
        position: tuple[int, int] | None = None,
        has_left: bool = False,
    ) -> None:
        super().__init__(f"worker {rank} on {node}: {reason}", detail)
        self.rank = rank
        self.node = node
        self.has_left = has_left
        self.had_begun = True
        self.loss = WorkerLoss(reason, position, has_left)


@dataclass(frozen=True)
class Reformed:
    """The result of `WorkerGroup.reform`."""

    kept: tuple[int, int, int] | None  # phase, step and stage of the state of rank 0; None: none
    source: int  # rank of this worker in the previous group; 0 if there is no state
    left: list[str]  # the workers that are not in the group any more, in words
    joined: list[str]  # host name of each new worker


class WorkerGroup(Protocol):
    """A group of warm workers with the ranks 0 to size - 1."""

    stop_requested: threading.Event
    """Set it to end the current function at its next step. The caller clears it before the next
    `run`."""

    streams: dict[Any, int]
    """While a function runs: the streams of messages that `Fleet.wait` waits for."""

    @property
    def size(self) -> int:
        """Number of ranks; `reform` may change it."""

    @property
    def nodes(self) -> list[str]:
        """Host name of each rank, once started."""

    @property
    def notices(self) -> list[str]:
        """Once started: lines for the user about the workers; later ones are appended."""

    def start(self) -> None:
        """Start the workers and connect them, once. Every later `run` reuses the processes.

        Raises:
            ConfigError: the cluster can never hold the workers; the message says what it lacks.
            InsufficientResources: it could, but other work occupies it.
            RunError: the workers did not start, or `stop_requested` was set in the meantime.
        """

    def run(self, function: WorkerFunction, *args: Any) -> Iterator[Any]:
        """Execute `function(world, *args)` on every worker and yield what rank 0 yields, at once.

        A group on a cluster also yields HeadLost and HeadRecovered (trainer.messages).

        The group can run again after a function that ended, also on request. After one that failed,
        or whose iterator was closed early, call `restart` first. The memory that the function used
        is released when it ends.

        Args:
            function: see `WorkerFunction`.
            args: its arguments after `world`. Their classes may be defined in `__main__` or in a
                notebook; modules of the user must be importable by the workers.

        Raises:
            ConfigError: an argument cannot be sent to the workers, or a worker raised it; then the
                message is the worker's.
            RunError: a worker raised it; running again would fail in the same way.
            ClusterLost: a worker was lost after the head node of the cluster.
            WorkerFailed: a worker raised another exception, died or hung.
        """

    def steps(self, function: WorkerFunction, *args: Any) -> Iterator[Any]:
        """As `run`, for a thread that follows many groups: yields a `Step` where `run` would wait.

        Raises as `run`.
        """

    def restart(self) -> None:
        """Make the group usable after `run` failed: replace lost workers, keep the others.

        Raises as `start`; InsufficientResources if a lost node was not replaced in time.
        """

    def reform(self, size: int | None = None, source: int | None = None) -> Reformed:
        """Make the group usable after `run` failed or stopped to change members: an elastic run.

        The remaining workers and those that have become ready meanwhile become the ranks of a new
        group. If workers keep a state of the run, one with the latest state is rank 0.

        Args:
            size: number of ranks, to repeat a recorded run; None: all available workers.
            source: current rank of the worker that becomes rank 0; None: see above.

        Raises as `start`; InsufficientResources if there are fewer than `cluster.min_workers` and
        no other became ready in time.
        """

    def alive(self) -> bool:
        """Whether all workers answer. Only between two runs."""

    def stop(self) -> None:
        """End all workers and everything that was started for them. May be called twice."""
