"""data=stream: splits of streams."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

from trainer.data.datasets import Collate, DatasetSplit
from trainer.data.sources import as_split
from trainer.data.split import Split, Splits
from trainer.data.streams import Stream, is_stream

Transform = Callable[[Any], tuple[Any, Any]]
"""From what a stream yields to (input, target)."""


def stream(
    train: Any,
    validation: Any,
    test: Any,
    transform: Transform | None = None,
    train_transform: Transform | None = None,
    steps_per_epoch: int | None = None,
    shuffle_buffer: int = 0,
    evaluation_samples: int | None = None,
    loader_workers: int = 0,
    collate: Collate | None = None,
    seed: int = 0,
) -> Splits:
    """Splits of streams: torch's IterableDatasets, other iterables, functions that return one.

    The samples are read in order, by every worker; `transform` is called only for those that it
    uses. Random numbers that a stream or `transform` draws from the global generators of torch,
    NumPy and Python are seeded, so that all workers and resumed runs see the same samples. A stream
    must not depend on anything else that changes.

    Args:
        train: Stream for training.
        validation: Stream, map-style Dataset or pair (inputs, targets) for validation. A stream
            must end.
        test: Likewise for testing.
        transform: Converts what the streams yield to (input, target); None: they yield such pairs.
        train_transform: Used instead for training; None: `transform`.
        steps_per_epoch: Optimizer steps in an epoch. When a pass ends, the next one begins; the
            next epoch continues where the last one stopped. None: an epoch is one pass over
            `train`, which must have a `__len__`.
        shuffle_buffer: Training samples are read in groups of this size, and each group is used in
            a random order; 0: the order of the stream.
        evaluation_samples: Maximum number of samples of `validation` and of `test` that are used;
            None: all.
        loader_workers: Processes per worker and split that read samples; 0: the worker does. Each
            of them reads the whole stream and calls `transform` for its own batches.
        collate: Makes a batch of a list of (input, target) pairs; None: they are stacked.
        seed: Seeds order and random numbers.

    Raises:
        ValueError: A stream can be read only once, or a number is out of range.
    """
    numbers = {
        "steps_per_epoch": (steps_per_epoch, 1),
        "shuffle_buffer": (shuffle_buffer, 0),
        "evaluation_samples": (evaluation_samples, 1),
        "loader_workers": (loader_workers, 0),
    }
    for key, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"data.{key}={value}: it must be at least {least}")

    def split(name: str, part: Any) -> Split:
        if not is_stream(part):
            return as_split(name, part, seed)
        if name == "train":
            convert = train_transform or transform
            samples = Stream(part, seed, convert, steps_per_epoch, shuffle_buffer)
        else:
            samples = Stream(part, seed, transform, limit=evaluation_samples)
        return DatasetSplit(samples, seed, loader_workers, collate=collate)

    if not is_stream(train) and not isinstance(train, DataLoader):
        raise ValueError(f"data.train: a {type(train).__name__} is not a stream; use data=dataset")
    parts = {"train": train, "validation": validation, "test": test}
    return Splits(**{name: split(name, part) for name, part in parts.items()})
