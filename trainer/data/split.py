"""The protocol of data for training, and an implementation that holds samples in memory.

A `Split` turns index tensors into batches. It knows nothing of workers, shuffling or batch sizes.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.data.prefetch import generator_states, prefetched, spare_cpus
from trainer.data.tree import map_tensors, tensors

_PREFETCH_S = 1e-3  # time to make a batch, from which making it ahead pays

IGNORED = -100
"""Targets of this value do not count in loss and metrics, as in torch's cross_entropy."""

Augment = Callable[[Tensor, Tensor, int], Tensor]
"""(inputs [n, ...], sample indices [n], epoch) -> inputs [n, ...]."""


class SampleError(ValueError):
    """A sample cannot be used.

    Attributes:
        index: Of the sample in its split.
        reason: What is wrong with it, and what to do.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"sample {self.index}: {self.reason}"


def name_sample(index: int, number: int | None) -> str:
    """A sample in words; one that was held out also by its number in the whole data set."""
    held_out = (
        "" if number is None else f" (number {number} of the data set that it was held out of)"
    )
    return f"sample {index}{held_out}"


class Split(Protocol):
    """Samples that can be read in any order."""

    def __len__(self) -> int:
        """Number of samples."""

    def batches(self, order: Iterable[Tensor], epoch: int | None) -> Iterator[tuple[Any, Tensor]]:
        """Yield one batch for each index tensor.

        Args:
            order: int64 tensors [n]; n may be 0, and differ between them.
            epoch: Seeds the augmentation; None: evaluation, without augmentation.

        Yields:
            (inputs, targets) on the CPU. Inputs are a tensor [n, ...]; or a tuple of tensors, which
            are positional arguments of the model; or a mapping of tensors, which are keyword
            arguments. Targets [n, ...] are int64 or floats: see `trainer.tasks`.
        """


def unwrapped(split: Any) -> Any:
    """The split inside of wrappers, which have it as their attribute `split`."""
    while hasattr(inner := getattr(split, "split", None), "batches"):
        split = inner
    return split


@dataclass(frozen=True)
class Splits:
    """The parts of a data set.

    Attributes:
        train: Samples to train on.
        validation: Samples to evaluate on after every epoch.
        test: Samples to evaluate on once, at the end.
    """

    train: Split
    validation: Split
    test: Split


class TensorSplit:
    """A split in memory. A batch is one indexed copy, followed by `augment` and `prepare`.

    Args:
        inputs: [n, ...] of any type; or a tuple or mapping of such tensors.
        targets: [n, ...], int64 or floats.
        augment: Changes the stored inputs of a training batch.
        prepare: Turns the inputs of any batch into those of the model, so that a compact form of
            them (bytes) can be stored.
        numbers: int64 [n], the samples in the data that they were held out of, for messages; None:
            they are all of the data.

    Raises:
        ValueError: `inputs` and `targets` differ in length.
    """

    def __init__(
        self,
        inputs: Any,
        targets: Tensor,
        augment: Augment | None = None,
        prepare: Callable[[Any], Any] | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        for tensor in tensors(inputs):
            if tensor.layout != torch.strided:
                raise ValueError(
                    "data: the inputs are a sparse tensor, of which no samples can be taken; give "
                    "to_dense() of it, or a Dataset of its rows with data.collate"
                )
            if len(tensor) != len(targets):
                raise ValueError(
                    f"{len(tensor)} inputs with {len(targets)} targets: give one for each"
                )
        self.inputs = inputs
        self.targets = targets
        self.augment = augment
        self.prepare = prepare
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self.targets)

    def sample_name(self, index: int) -> str:
        """A sample in words, for messages."""
        return name_sample(index, None if self._numbers is None else int(self._numbers[index]))

    def batches(self, order: Iterable[Tensor], epoch: int | None) -> Iterator[tuple[Any, Tensor]]:
        """As `Split.batches`.

        If a batch takes at least a millisecond and CPUs are free, a thread makes the next batches
        ahead; but not if `augment` or `prepare` draw from the global random generators, since the
        numbers would then depend on the time of drawing.
        """
        batches = self._batches(order, epoch)
        if spare_cpus() < 1:
            yield from batches
            return
        states, began = generator_states(), time.perf_counter()
        for first in batches:
            slow = time.perf_counter() - began >= _PREFETCH_S
            ahead = slow and generator_states() == states
            yield first
            yield from prefetched(batches) if ahead else batches

    def _batches(self, order: Iterable[Tensor], epoch: int | None) -> Iterator[tuple[Any, Tensor]]:
        for indices in order:
            inputs = map_tensors(partial(torch.index_select, dim=0, index=indices), self.inputs)
            if epoch is not None and self.augment is not None:
                inputs = self.augment(inputs, indices, epoch)
            if self.prepare is not None:
                inputs = self.prepare(inputs)
            yield inputs, self.targets.index_select(0, indices)
