"""What the training loop asks of data, and the split that answers from memory.

A `Split` turns index tensors into batches. It knows nothing of workers, shuffling or batch sizes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Augment = Callable[[Tensor, Tensor, int], Tensor]  # (inputs, sample indices, epoch) -> inputs


class Split(Protocol):
    """Samples that can be fetched in any order."""

    def __len__(self) -> int:
        """Number of samples."""

    def batches(
        self, order: Iterable[Tensor], epoch: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets) on the CPU for each int64 index tensor [n] of `order`, in that order.

        n may be 0. The first dimension of both is n; targets are int64 classes. `epoch` seeds the
        augmentation; None is evaluation, without any.
        """


@dataclass(frozen=True)
class Splits:
    """A data set: fitted on train, watched on validation, judged once, at the end, on test."""

    train: Split
    validation: Split
    test: Split


class TensorSplit:
    """A split in memory. One batch costs one indexed copy and what `augment` and `prepare` cost.

    `augment` changes the stored inputs of a training batch; `prepare` turns the inputs of any batch
    into what the model takes, so that compact ones (bytes) can be stored. Raises ValueError if
    inputs and targets differ in length.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        augment: Augment | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs with {len(targets)} targets: give one for each")
        self.inputs = inputs
        self.targets = targets
        self.augment = augment
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(
        self, order: Iterable[Tensor], epoch: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Split.batches`."""
        for indices in order:
            inputs = self.inputs.index_select(0, indices)
            if epoch is not None and self.augment is not None:
                inputs = self.augment(inputs, indices, epoch)
            if self.prepare is not None:
                inputs = self.prepare(inputs)
            yield inputs, self.targets.index_select(0, indices)
