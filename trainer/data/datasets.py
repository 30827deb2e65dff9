"""Any map-style torch Dataset of (input, target) pairs, read by DataLoader worker processes.

A sample's random numbers (torch's, numpy's, Python's) are seeded with (seed, epoch, index) around
`__getitem__`, so augmentation is the same for any number of trainers and loader workers.
"""

import contextlib
import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from trainer.data.hashing import mix
from trainer.data.order import permutation
from trainer.data.split import Split, Splits

SPLIT_SEED = 0  # of the permutation that holds samples out: never the run's seed
EVALUATION = -1  # stands for the epoch when there is none

Request = tuple[int, list[int]]  # epoch, sample indices


def seed_generators(seed: int) -> None:
    """Seed the three CPU generators that augmentations draw from; `seed` is in [0, 2^64)."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextlib.contextmanager
def generators_left_alone() -> Iterator[None]:
    """Whatever is drawn or seeded within, those three generators go on as if it had not been."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def kind(value: Any) -> str:
    """What a value is, for an error message."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def checked(item: Any, index: int) -> tuple[Tensor, int | Tensor]:
    """The item as an (input tensor, integer target) pair. Raises ValueError if it is none."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ValueError(f"sample {index}: it must be a pair (input, target), not {kind(item)}")
    value, target = item
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(target, np.ndarray | np.generic):
        target = torch.as_tensor(target)
    if not isinstance(value, Tensor) or not (
        value.is_floating_point() or value.dtype in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"sample {index}: its input must be a tensor or array of floats (or of int32/int64 "
            f"tokens), not {kind(value)}; convert it in the data set"
        )
    if isinstance(target, Tensor):
        whole = not (target.is_floating_point() or target.is_complex())
    else:
        whole = isinstance(target, int)
    if not whole:
        raise ValueError(f"sample {index}: its target must be an integer class, not {kind(target)}")
    return value, target


def stacked(tensors: Sequence[Tensor], indices: Sequence[int], what: str) -> Tensor:
    """The tensors as one with a new first dimension. Raises ValueError if their shapes differ."""
    for index, tensor in zip(indices, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"samples {indices[0]} and {index}: their {what} have shapes "
                f"{tuple(tensors[0].shape)} and {tuple(tensor.shape)}; make them equal"
            )
    return torch.stack(list(tensors))


def fork_server() -> BaseContext:
    """Where loader processes come from: a process with threads, such as Ray's, must not be forked.

    The server has torch imported, so that a loader process starts in a tenth of a second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


class SeededBatches(Dataset[tuple[Tensor, Tensor]]):
    """`[epoch, indices]` -> one batch of a data set, each sample under its own seed."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        epoch, wanted = request
        # An empty batch still has the shape of a sample, so one is fetched to learn it.
        indices = wanted or [0]
        pairs = []
        with generators_left_alone():
            for index in indices:
                seed_generators(mix(self.seed, epoch, index))
                pairs.append(checked(self.dataset[index], index))
        inputs = stacked([value for value, _ in pairs], indices, "inputs")
        targets = stacked([torch.as_tensor(target) for _, target in pairs], indices, "targets")
        return inputs[: len(wanted)], targets[: len(wanted)].long()


class Requests:
    """What a loader is asked for at present: it keeps its workers while this changes."""

    def __init__(self) -> None:
        self.order: Iterable[Tensor] = ()
        self.epoch = EVALUATION

    def __iter__(self) -> Iterator[Request]:
        return ((self.epoch, indices.tolist()) for indices in self.order)


class DatasetSplit:
    """A map-style Dataset as a `Split`, fetched here or by `loader_workers` processes.

    The processes start with the first batch and stay until the split goes away.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, loader_workers: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.requests = Requests()
        self.reading = False
        self.loader = self._loader(self.requests, loader_workers, stay=True)

    def _loader(
        self, requests: Iterable[Request], workers: int, stay: bool
    ) -> "DataLoader[tuple[Tensor, Tensor]]":
        return DataLoader(
            SeededBatches(self.dataset, self.seed),
            # With batch_size None a "sample index" of the loader is a whole request of ours.
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            persistent_workers=stay and workers > 0,
            multiprocessing_context=fork_server() if workers else None,
            # Its own generator: a loader draws a number per pass, from the global one by default.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def first(self) -> tuple[Tensor, Tensor]:
        """The first sample, as a batch of evaluation; its process ends with that.

        Not read here where there are loader processes: a data set that opens its files with the
        first sample could not be pickled for them any more.
        """
        workers = min(1, self.loader.num_workers)
        loader = self._loader([(EVALUATION, [0])], workers, stay=False)
        batches: list[tuple[Tensor, Tensor]] = list(loader)
        return batches[0]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def batches(
        self, order: Iterable[Tensor], epoch: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Split.batches`. One pass at a time: a second one at once is a RuntimeError."""
        if self.reading:
            raise RuntimeError("this split is being read already: finish or close that pass first")
        self.reading = True
        self.requests.order = order
        self.requests.epoch = EVALUATION if epoch is None else epoch
        try:
            yield from self.loader
        finally:
            self.reading = False


def sample_name(split: Split, index: int) -> str:
    """A sample of a split in words, also by its number in the data set that it was held out of."""
    name = f"sample {index}"
    if isinstance(split, DatasetSplit) and isinstance(split.dataset, Subset):
        name += f" (number {split.dataset.indices[index]} of the data set)"
    return name


def held_out_size(samples: int, share: float, n_parts: int) -> int:
    """Samples in each of `n_parts` held-out parts: round(share x samples).

    Raises:
        ValueError: A part, or what remains for training, would be empty.
    """
    size = round(share * samples)
    if size < 1 or n_parts * size >= samples:
        raise ValueError(
            f"data.hold_out={share}: {n_parts} times {size} of {samples} training samples cannot "
            "be held out; change the fraction or give data.validation and data.test"
        )
    return size


def held_out(dataset: Dataset[Any], share: float, n_parts: int) -> list[Dataset[Any]]:
    """`n_parts` disjoint held-out parts, then the rest, chosen by a fixed permutation.

    Raises ValueError as `held_out_size`.
    """
    n = len(dataset)  # type: ignore[arg-type]
    size = held_out_size(n, share, n_parts)
    order = permutation(n, SPLIT_SEED, 0)
    edges = [i * size for i in range(1, n_parts + 1)]
    return [Subset(dataset, part.tolist()) for part in order.tensor_split(edges)]


def dataset(
    train: Dataset[Any],
    validation: Dataset[Any] | None = None,
    test: Dataset[Any] | None = None,
    hold_out: float = 0.1,
    loader_workers: int = 0,
    seed: int = 0,
) -> Splits:
    """Splits of Datasets whose items are (input, integer target) pairs.

    Where `validation` or `test` is None, the fraction `hold_out` of `train` is kept back for it, by
    a fixed permutation; it then goes through the same `__getitem__` as `train`, augmentation
    included. Each trainer starts `loader_workers` processes per split that it reads; 0: it fetches
    samples itself. Raises ValueError for something that is no map-style data set.
    """
    for key, value in (("train", train), ("validation", validation), ("test", test)):
        absent = value is None and key != "train"
        by_index = hasattr(value, "__len__") and hasattr(value, "__getitem__")
        if not absent and (not by_index or isinstance(value, IterableDataset)):
            raise ValueError(
                f"data.{key}: {type(value).__name__} is no map-style data set: it needs __len__ "
                "and __getitem__"
            )
    if loader_workers < 0:
        raise ValueError(f"data.loader_workers={loader_workers}: it must be at least 0")

    missing = (validation is None) + (test is None)
    *parts, rest = held_out(train, hold_out, missing) if missing else [train]
    if validation is None:
        validation = parts.pop(0)
    if test is None:
        test = parts.pop(0)

    def split(samples: Dataset[Any]) -> Split:
        return DatasetSplit(samples, seed, loader_workers)

    return Splits(train=split(rest), validation=split(validation), test=split(test))
