"""A split whose samples are checked as they are read: errors name the split and the sample."""

from collections import deque
from collections.abc import Iterable, Iterator

from torch import Tensor

from trainer.data.datasets import DatasetSplit
from trainer.data.split import IGNORED, SampleError, Split
from trainer.errors import RunError


class CheckedSplit:
    """A `Split` that refuses targets for which the model has no output.

    On CUDA such a target would end the process without saying which one it was.

    Args:
        split: What to read from.
        name: Of the split, for messages: train, validation or test.
        classes: Number of outputs of the model; targets are below it, or IGNORED.
    """

    def __init__(self, split: Split, name: str, classes: int) -> None:
        self.split = split
        self.name = name
        self.classes = classes

    def __len__(self) -> int:
        return len(self.split)

    def batches(
        self, order: Iterable[Tensor], epoch: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Split.batches`. Raises RunError for a sample that cannot be used."""
        requested: deque[Tensor] = deque()  # a loader may request batches ahead

        def recorded() -> Iterator[Tensor]:
            for indices in order:
                requested.append(indices)
                yield indices

        try:
            for inputs, targets in self.split.batches(recorded(), epoch):
                self.check_targets(requested.popleft(), targets)
                yield inputs, targets
        except SampleError as error:
            raise RunError(f"data: {self.describe(error)}") from error

    def check_targets(self, indices: Tensor, targets: Tensor) -> None:
        """Raise SampleError for a target that is neither below `classes` nor IGNORED.

        Args:
            indices: Of the samples [n].
            targets: Of the samples, int64 [n, ...].
        """
        if not targets.numel():
            return
        values = targets.numpy()  # for a few values, NumPy is faster than torch
        if values.min() >= 0 and values.max() < self.classes:
            return
        wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= self.classes)
        for position in wrong.reshape(len(wrong), -1).any(1).nonzero().flatten().tolist()[:1]:
            label = targets[position][wrong[position]].flatten()[0]
            raise SampleError(
                int(indices[position]),
                f"its target is {int(label)}, but the model has {self.classes} outputs, for "
                f"targets from 0 to {self.classes - 1} (and {IGNORED}, which is ignored)",
            )

    def describe(self, error: SampleError) -> str:
        """The error in words, with the names of split and sample."""
        return f"{self.name} {sample_name(self.split, error.index)}: {error.reason}"


def sample_name(split: Split, index: int) -> str:
    """A sample of a split in words, for messages."""
    while isinstance(split, CheckedSplit):
        split = split.split
    return split.sample_name(index) if isinstance(split, DatasetSplit) else f"sample {index}"
