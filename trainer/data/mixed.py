"""Pairs of training samples that are mixed: mixup and cutmix.

Which samples are mixed, and how, depends on the seed, the epoch and the global batch, and not on
which worker computes them.
"""

import math
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.data.hashing import mix
from trainer.data.order import permutation
from trainer.data.split import Split
from trainer.data.streams import stream_of

_DRAWS = 0x6D6978  # separates the seeds of the draws from those of the order


@dataclass(frozen=True)
class Mix:
    """How the samples of a global batch are mixed with their partners."""

    share: float  # of a sample itself, in [0, 1]
    center: tuple[float, float] | None  # cutmix: of the box, as fractions of height and width

    def inputs(self, own: Tensor, partners: Tensor) -> tuple[Tensor, float]:
        """Mix inputs [n, ...]; with cutmix [n, channels, height, width].

        Returns:
            The mixed inputs, and the share of the samples themselves in them.
        """
        if self.center is None:
            return own * self.share + partners * (1 - self.share), self.share
        height, width = own.shape[-2:]
        side = math.sqrt(1 - self.share)
        (top, bottom), (left, right) = (
            _interval(at, side, size) for at, size in zip(self.center, (height, width), strict=True)
        )
        mixed = own.clone()
        mixed[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def draw_mix(mixup: float, cutmix: float, seed: int, epoch: int, batch: int) -> Mix:
    """How a global batch is mixed.

    The share is drawn from Beta(a, a) (Zhang et al., mixup, ICLR 2018, arXiv:1710.09412); with
    cutmix, a box of the partner replaces the remaining area (Yun et al., CutMix, ICCV 2019,
    arXiv:1905.04899, algorithm 1). With both, each batch takes one of them at random.

    Args:
        mixup: The parameter a of mixup; 0: not used.
        cutmix: The parameter a of cutmix; 0: not used.
        seed: Of the run.
        epoch: Of the run.
        batch: Number of the global batch in its epoch.
    """
    draws = random.Random(mix(seed, epoch, batch, _DRAWS))
    cut = draws.random() < 0.5 if mixup and cutmix else bool(cutmix)
    alpha = cutmix if cut else mixup
    share = draws.betavariate(alpha, alpha)
    return Mix(share, (draws.random(), draws.random()) if cut else None)


class MixedSplit:
    """A `Split` whose training batches contain what mixing them needs.

    Neighbours in a global batch are partners of one another; since the order is random, so are the
    pairs. Where a worker's share of the batch cuts a pair, its batches contain the partner as well.

    Batches of an epoch are (inputs, targets) with the mapping

    - `inputs` [n + m, ...]: of the n samples that were requested, and of m more;
    - `targets` [n + m, ...]: likewise;
    - `partners` int64 [n]: positions of the partners of the n samples in them;
    - `mix`: a `Mix`

    as inputs, and the targets [n, ...] of the samples themselves. In evaluation (epoch None) they
    are those of the split.

    Args:
        split: With one tensor as inputs.
        mixup: As for `draw_mix`.
        cutmix: Likewise; the inputs must be [n, channels, height, width].
        seed: Of the run.
        batch_size: Global.
    """

    def __init__(
        self, split: Split, mixup: float, cutmix: float, seed: int, batch_size: int
    ) -> None:
        self.split = split
        self._alphas = mixup, cutmix
        self._seed = seed
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, order: Iterable[Tensor], epoch: int | None) -> Iterator[tuple[Any, Tensor]]:
        """As `Split.batches`; each index tensor is a part of one global batch, not empty."""
        if epoch is None:
            yield from self.split.batches(order, epoch)
            return
        samples = permutation(len(self), self._seed, epoch, stream_of(self.split) is None)
        positions = torch.empty_like(samples)
        positions[samples] = torch.arange(len(samples))
        requested: deque[tuple[list[int], int]] = deque()  # a loader may request batches ahead

        def extended() -> Iterator[Tensor]:
            for indices in order:
                own = positions[indices].tolist()
                found = {position: number for number, position in enumerate(own)}
                pairs = [self._partner(position) for position in own]
                partners = [found.setdefault(position, len(found)) for position in pairs]
                requested.append((partners, own[0] // self._batch_size))
                yield samples[list(found)]

        for inputs, targets in self.split.batches(extended(), epoch):
            partners, batch = requested.popleft()
            mixed = {
                "inputs": inputs,
                "targets": targets,
                "partners": torch.tensor(partners),
                "mix": draw_mix(*self._alphas, self._seed, epoch, batch),
            }
            yield mixed, targets[: len(partners)]

    def _partner(self, position: int) -> int:
        """The neighbour in the same global batch; the last sample of an odd one has only itself."""
        start = position - position % self._batch_size
        end = min(start + self._batch_size, len(self))
        partner = start + ((position - start) ^ 1)
        return partner if partner < end else position


def _interval(center: float, side: float, size: int) -> tuple[int, int]:
    """The part of a box that lies in an image, in pixels [begin, end), along one dimension."""
    middle, half = int(center * size), int(side * size) // 2
    return max(0, middle - half), min(size, middle + half)
