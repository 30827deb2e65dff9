"""The members of the next group of an elastic run: pure functions of the workers' answers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Position = tuple[int, int, int]


@dataclass(frozen=True)
class Answer:
    """The answer of a worker of the previous group."""

    rank: int  # in that group
    kept: Position | None  # phase, step and stage of the state that it keeps; None: it has none
    leaves: bool = False  # its host has been given notice


def choose(answers: Sequence[Answer], others: int, minimum: int) -> list[Answer]:
    """The workers of the previous group that stay, rank 0 first.

    Parameters are equal on all ranks after the same step, and a step that one rank has completed
    is complete: all gradients were in its sum. So the latest state of any rank is continued, and
    no step is repeated. Workers whose host leaves hand over their state and are left out,
    unless fewer than `minimum` would remain.

    Args:
        answers: of the workers that are alive.
        others: number of new workers.
        minimum: of all together.
    """
    staying = [answer for answer in answers if not answer.leaves]
    leaving = [answer for answer in answers if answer.leaves]
    staying += leaving[: max(0, minimum - others - len(staying))]
    if not staying:
        return []
    first = max(staying, key=lambda answer: (answer.kept or (-1, 0, 0), -answer.rank))
    rest = sorted((a for a in staying if a is not first), key=lambda answer: answer.rank)
    return [first, *rest]


def to_drop(failed: Sequence[int], blamed: Sequence[int | None]) -> int:
    """The rank to leave out after ranks that are all alive could not connect with one another.

    Args:
        failed: the ranks that failed, at least one.
        blamed: for each of them, the rank that it could not reach; None: it does not know.

    Returns:
        The rank that most of the others could not reach. Among equals the highest one, so that
        rank 0, whose state is continued, stays.
    """
    counts = Counter(rank for rank in blamed if rank is not None)
    counts.update(dict.fromkeys(failed, 0))
    return max(counts, key=lambda rank: (counts[rank], rank))
