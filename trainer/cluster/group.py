"""What every worker group is: start once, run bodies on all workers, stop."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.cluster.restart import Loss
from trainer.errors import RunError

Body = Callable[..., Iterator[Any]]
"""What workers execute: `body(world, *args)`, a generator; every rank runs the same lines."""


@dataclass(frozen=True)
class Failure:
    """What a body raised, told as a message: it must survive classes that cannot be pickled."""

    reason: str
    detail: str
    wrong_config: bool = False
    final: bool = False  # doing it again would end in the same way
    peer: bool = False  # only a consequence: another worker went away first
    place: tuple[int, int] | None = None  # phase and step; None: not known

    def spoils(self, device: str) -> bool:
        """Whether its worker is of no use any more, though its process lives.

        After an error on a GPU, such as a failed assertion in a kernel, every later CUDA call of
        the process fails too; which errors are of that kind cannot be told from outside.
        """
        known = self.wrong_config or self.final or self.peer
        return device == "cuda" and not known


class NoRoom(RunError):
    """The cluster has no room for the workers, and got none while they waited for it."""


class WorkerFailed(RunError):
    """A worker raised, or died.

    Attributes:
        rank: which one.
        node: host name it ran on.
        detail: its whole traceback, or what is known of its death.
        loss: what decides whether to start again (trainer.cluster.restart).
    """

    def __init__(
        self,
        rank: int,
        node: str,
        reason: str,
        detail: str,
        place: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(f"worker {rank} on {node}: {reason}", detail)
        self.rank = rank
        self.node = node
        self.loss = Loss(reason, place)


class WorkerGroup(Protocol):
    """A gang of warm workers with ranks 0 to size - 1."""

    size: int

    @property
    def nodes(self) -> list[str]:
        """Host name of each rank, once started."""

    stop_asked: threading.Event  # set it, and the body ends at its next step; clear it to run again

    def start(self) -> None:
        """Start the workers and connect them, once; afterwards every `run` is warm.

        Raises:
            ConfigError: the cluster lacks what is asked for; the message says what.
            RunError: it could, but did not start, or `stop_asked` was set meanwhile; NoRoom where
                others take up the room.
        """

    def run(self, body: Body, *args: Any) -> Iterator[Any]:
        """Execute `body(world, *args)` on every worker and yield what rank 0 yields, as it does.

        The group can run again after a body that ended; after one that failed it must be restarted
        or stopped, after one whose iterator was closed early it must be stopped.

        Raises:
            ConfigError: a worker raised it; the message is the worker's.
            RunError: likewise; running again would end in the same way.
            WorkerFailed: a worker raised anything else, died, or hung.
        """

    def restart(self) -> None:
        """After WorkerFailed: replace the workers that are lost, keep the others, connect anew.

        Raises as `start`; NoRoom where a node went away and none came.
        """

    def alive(self) -> bool:
        """Whether all workers answer; only between two runs."""

    def stop(self) -> None:
        """End all workers and whatever was started for them. May be called twice."""
