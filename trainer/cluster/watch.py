"""Which worker hangs: a judgement on the signs of life that came in, and on when."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """What a worker says of itself when asked."""

    beats: int  # steps and batches done so far
    waiting: bool  # for other workers
    place: tuple[int, int]  # phase and step


@dataclass
class _Seen:
    sign: Sign | None
    moved: float  # when it last did something, or was waiting for others


class Watch:
    """Collects signs and tells who has been silent or still for too long.

    A worker that waits for another one does not hang; the other one does. All times are seconds of
    one clock.
    """

    def __init__(self, size: int, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._seen = [_Seen(None, now) for _ in range(size)]

    def heard(self, rank: int, sign: Sign, now: float) -> None:
        """Take in a sign of `rank`."""
        seen = self._seen[rank]
        if seen.sign is None or sign.waiting or sign.beats != seen.sign.beats:
            seen.moved = now
        seen.sign = sign

    def place(self, rank: int) -> tuple[int, int] | None:
        """Where `rank` was when last heard of."""
        sign = self._seen[rank].sign
        return sign.place if sign else None

    def hung(self, now: float) -> int | None:
        """The rank that has been still for longest, if that is too long."""
        rank = min(range(len(self._seen)), key=lambda r: self._seen[r].moved)
        return rank if now - self._seen[rank].moved > self._timeout_s else None
