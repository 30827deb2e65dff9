"""Which worker hangs: a judgement on the signs of life that came in, and on when."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """What a worker says of itself when asked."""

    beats: int  # steps and batches done so far
    waiting: bool  # for other workers, or at work that gives no beats
    place: tuple[int, int]  # phase and step
    where: str  # the same in words


AWAY_S = 2.0  # seconds between two looks, above which the watcher itself was away


@dataclass
class _Seen:
    sign: Sign | None
    moved: float  # when it last did something, or was waiting


class Watch:
    """Collects signs and tells who has been silent or still for too long.

    A worker that waits for another one does not hang; the other one does. Time in which nobody
    looked, because the watcher was busy or stopped itself, is held against no one. All times are
    seconds of one clock.
    """

    def __init__(self, size: int, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._seen = [_Seen(None, now) for _ in range(size)]
        self._working = set(range(size))
        self._looked = now

    def ended(self, rank: int) -> None:
        """Say that `rank` has nothing more to do, and so gives no more signs."""
        self._working.discard(rank)

    def look(self, now: float) -> None:
        """Say that the watcher is there: before `heard` and `hung`, again and again."""
        away = now - self._looked - AWAY_S
        self._looked = now
        if away > 0:
            for seen in self._seen:
                seen.moved += away

    def heard(self, rank: int, sign: Sign, now: float) -> None:
        """Take in a sign of `rank`."""
        seen = self._seen[rank]
        if seen.sign is None or sign.waiting or sign.beats != seen.sign.beats:
            seen.moved = now
        seen.sign = sign

    def last(self, rank: int) -> Sign | None:
        """What `rank` said last; None: nothing yet."""
        return self._seen[rank].sign

    def hung(self, now: float) -> int | None:
        """The rank at work that has been still for longest, if that is too long."""
        rank = min(self._working, key=lambda r: (self._seen[r].moved, r), default=None)
        if rank is None or now - self._seen[rank].moved <= self._timeout_s:
            return None
        return rank
