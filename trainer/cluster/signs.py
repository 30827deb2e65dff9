"""Signs of life of Ray actors: asked for while they work, and held against the clock."""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from trainer.cluster.watch import Sign, Watch

LOOK_EVERY_S = 0.5  # seconds between two looks, and between two at a request to stop


class Signs:
    """Asks every worker for signs of life, one question at a time, and has them watched."""

    def __init__(self, actors: Sequence[Any], timeout_s: float) -> None:
        self._actors = actors
        self._watch = Watch(len(actors), timeout_s, time.monotonic())
        self._asked: dict[Any, int] = {}
        self._looked = 0.0

    def look(self) -> int | None:
        """Take in all that was answered, ask again, and say which rank hangs, if any.

        Call it as often as you like: it does nothing where the last look is not long ago.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return None
        self._looked = now
        self._watch.look(now)
        if self._asked:
            answered, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
            for ref in answered:
                rank = self._asked.pop(ref)
                try:
                    sign = ray.get(ref)
                except RayError:  # of a worker that died its own stream tells
                    continue
                if sign is not None:
                    self._watch.heard(rank, sign, now)
        for rank in set(range(len(self._actors))) - set(self._asked.values()):
            self._asked[self._actors[rank].sign.remote()] = rank
        return self._watch.hung(now)

    def ended(self, rank: int) -> None:
        """Say that the body of `rank` has ended; the others may go on for as long as they like."""
        self._watch.ended(rank)

    def last(self, rank: int) -> Sign | None:
        """What `rank` said last; None: nothing yet."""
        return self._watch.last(rank)
