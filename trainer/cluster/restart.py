"""Whether a run starts again after a worker was lost: a pure function of what happened so far."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """How a worker was lost."""

    reason: str
    place: tuple[int, int] | None  # phase and step of the run; None: not known


def why_not_restart(losses: Sequence[Loss], max_restarts: int) -> str | None:
    """The reason to give up after the last of `losses`; None: start again.

    What comes again at the same step is no accident: starting again would only repeat it.
    """
    last = losses[-1]
    if last.place is not None and last in losses[:-1]:
        return "the same error came again at the same step"
    if len(losses) > max_restarts:
        return f"cluster.max_restarts={max_restarts} is used up"
    return None
