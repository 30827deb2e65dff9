"""A split that checks samples when they are read: errors name the split and the sample."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from trainer.data.split import SampleError, Split, unwrapped
from trainer.errors import RunError, described

TargetCheck = Callable[[Tensor], tuple[int, str] | None]
"""From targets [n, ...] to the position of one that cannot be used and the reason, or None."""


class CheckedSplit:
    """A `Split` that refuses targets that the task cannot use with the model.

    On CUDA such a target would end the process without a message about the sample.

    Args:
        split: The split to read from.
        name: Of the split, for messages: train, validation or test.
        check: Finds a target that cannot be used.

    Attributes:
        waited_s: Seconds that the caller has waited for batches.
    """

    def __init__(self, split: Split, name: str, check: TargetCheck) -> None:
        self.split = split
        self.name = name
        self.check = check
        self.waited_s = 0.0

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, order: Iterable[Tensor], epoch: int | None) -> Iterator[tuple[Any, Tensor]]:
        """As `Split.batches`. Raises RunError for a sample that cannot be used."""
        requested: deque[Tensor] = deque()  # a loader may request batches ahead

        def recorded() -> Iterator[Tensor]:
            for indices in order:
                requested.append(indices)
                yield indices

        try:
            batches = self.split.batches(recorded(), epoch)
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                self.waited_s += time.perf_counter() - began
                if batch is None:
                    return
                inputs, targets = batch
                self.check_targets(requested.popleft(), targets)
                yield inputs, targets
        except SampleError as error:
            raise RunError(f"data: {self.describe(error)}") from error
        except Exception as error:
            error.add_note(f"in the {self.name} data")
            if isinstance(error, ConnectionError | TimeoutError):  # not that of a lost rank
                raise OSError(described(error)) from error
            raise

    def check_targets(self, indices: Tensor, targets: Tensor) -> None:
        """Raise SampleError for a target that cannot be used.

        Args:
            indices: Of the samples [n].
            targets: Of the samples [n, ...], or more, such as one for each node of n graphs.
        """
        if len(targets) and (found := self.check(targets)) is not None:
            position, reason = found
            if len(targets) == len(indices):
                raise SampleError(int(indices[position]), reason)
            raise SampleError(int(indices[0]), f"in a batch of {len(indices)}, {reason}")

    def describe(self, error: SampleError) -> str:
        """The error in words, with the names of split and sample."""
        return describe_sample(self.name, self.split, error)


def describe_sample(name: str, split: Split, error: SampleError) -> str:
    """The error in words, with the names of split and sample."""
    return f"{name} {sample_name(split, error.index)}: {error.reason}"


def sample_name(split: Split, index: int) -> str:
    """A sample of a split in words, for messages."""
    split = unwrapped(split)
    named: Callable[[int], str] = getattr(split, "sample_name", "sample {}".format)
    return named(index)
