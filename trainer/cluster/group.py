"""What every worker group is: start once, run bodies on all workers, stop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.errors import RunError

Body = Callable[..., Iterator[Any]]
"""What workers execute: `body(world, *args)`, a generator; every rank runs the same lines."""


@dataclass(frozen=True)
class Failure:
    """What a body raised, told as a message: it must survive classes that cannot be pickled."""

    reason: str
    detail: str
    wrong_config: bool = False
    peer: bool = False  # only a consequence: another worker went away first


class WorkerFailed(RunError):
    """A worker raised, or died.

    Attributes:
        rank: which one.
        node: host name it ran on.
        detail: its whole traceback, or what is known of its death.
    """

    def __init__(self, rank: int, node: str, reason: str, detail: str) -> None:
        super().__init__(f"worker {rank} on {node}: {reason}", detail)
        self.rank = rank
        self.node = node


class WorkerGroup(Protocol):
    """A gang of warm workers with ranks 0 to size - 1."""

    size: int
    nodes: list[str]  # host name of each rank, once started

    def start(self) -> None:
        """Start the workers and connect them, once; afterwards every `run` is warm.

        Raises:
            ConfigError: the cluster lacks what is asked for; the message says what.
            RunError: it could, but did not start.
        """

    def run(self, body: Body, *args: Any) -> Iterator[Any]:
        """Execute `body(world, *args)` on every worker and yield what rank 0 yields, as it does.

        The group can run again after a body that ended. After one that failed, or whose iterator
        was closed early, it must be stopped.

        Raises:
            ConfigError: a worker raised it; the message is the worker's.
            WorkerFailed: a worker raised anything else, or died.
        """

    def stop(self) -> None:
        """End all workers and whatever was started for them. May be called twice."""
