"""Decides whether a run restarts after a worker was lost: a pure function of the losses so far."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerLoss:
    """How and where a worker was lost."""

    reason: str
    position: tuple[int, int] | None  # phase and step of the run; None: unknown
    has_left: bool = False  # its host has left the cluster


def why_not_restart(losses: Sequence[WorkerLoss], max_restarts: int) -> str | None:
    """The reason to give up after the last of `losses`, or None to restart.

    An error that occurs twice at the same step is deterministic: a restart would only repeat it.
    Hosts that leave the cluster use up no restarts.
    """
    last = losses[-1]
    if last.has_left:
        return None
    if last.position is not None and last in losses[:-1]:
        return "the same error occurred twice at the same step"
    if sum(not loss.has_left for loss in losses) > max_restarts:
        return f"cluster.max_restarts={max_restarts} is used up"
    return None
