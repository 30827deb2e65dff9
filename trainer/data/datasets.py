"""Map-style torch Datasets of (input, target) pairs, read here or by DataLoader processes.

The random numbers of a sample (torch's, NumPy's and Python's) are seeded with (seed, epoch, index)
around `__getitem__`, so that augmentation is the same for any number of workers and loader
processes.
"""

import contextlib
import pickle
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from trainer.data.hashing import mix
from trainer.data.loaders import fork_server, start_loader
from trainer.data.order import permutation
from trainer.data.prefetch import spare_cpus
from trainer.data.split import SampleError, Split, Splits, name_sample
from trainer.data.tree import first_samples, merge
from trainer.errors import ConfigError, first_line

SPLIT_SEED = 0
"""Seed of the permutation that chooses held-out samples, which are the same for every run."""

EVALUATION = -1
"""Used instead of the epoch when the random numbers of a sample are seeded for evaluation."""

_MAX_WORKERS = 8  # loader processes that are started by default, per split
_TIMED_SAMPLES = 8  # that are read to find out what one costs
_PROCESS_S = 50e-6  # seconds per sample from which on another process is worth it

NO_LOADER = (
    "is a DataLoader, but batches are made here: pass its dataset and batch_size, such as "
    "data=loader.dataset, batch_size=64"
)

_LOADER_TRACEBACK = "\nOriginal Traceback"  # torch writes it into errors of loader processes
_READ_SAMPLE = re.compile(r"^while sample (\d+) was")  # a note of `SeededBatches`

Request = tuple[int, list[int]]  # epoch, sample indices
Batch = tuple[Any, Tensor]  # inputs (see Split.batches), targets


Collate = Callable[[Sequence[tuple[Any, Any]]], Batch]
"""From (input, target) pairs to the inputs and targets of a batch."""


def seed_generators(seed: int) -> None:
    """Seed the CPU generators of torch, NumPy and Python with a number in [0, 2^64)."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the state of those three generators at the end of the block."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def to_tensor(array: NDArray[Any]) -> Tensor:
    """An array as a tensor: copied where torch cannot share its byte order, strides or memory.

    Raises:
        TypeError: torch has no such type of numbers.
    """
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


class SeededBatches(Dataset[Batch | SampleError]):
    """`[epoch, indices]` -> one batch of a Dataset, each sample under its own seed.

    An unusable sample is returned as a `SampleError` instead of raised: a loader process would
    bury its message in a traceback.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, collate: Collate | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self._collate = collate
        self._check = _as_it_is if getattr(dataset, "trusted", False) else _check_item
        # False: samples draw no random numbers, or the Dataset seeds the generators itself.
        self._draws = getattr(dataset, "draws", True)
        self._begin_batch = getattr(dataset, "begin_batch", None)  # of a stream

    def __getitem__(self, request: Request) -> Batch | SampleError:
        epoch, wanted = request
        # An empty batch has the shape of a sample too, so one is read to find it out.
        indices = wanted or [0]
        pairs = []
        try:
            with preserved_generators():
                if self._begin_batch is not None:
                    self._begin_batch(epoch, indices)
                for index in indices:
                    if self._draws:
                        seed_generators(mix(self.seed, epoch, index))
                    pairs.append(self._check(self._read(index), index))
                if self._collate is not None:
                    inputs, targets = self._collated(pairs, indices)
            if self._collate is None:
                inputs = _stack([value for value, _ in pairs], indices, "inputs")
                labels = [torch.as_tensor(target) for _, target in pairs]
                targets = _stack(labels, indices, "targets")
        except SampleError as error:
            return error
        targets = targets.float() if targets.is_floating_point() else targets.long()
        if not wanted:
            return first_samples(inputs, 0), targets[:0]
        return inputs, targets

    def _collated(self, pairs: Sequence[tuple[Any, Any]], indices: Sequence[int]) -> Batch:
        assert self._collate is not None
        try:
            inputs, targets = self._collate(pairs)
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            reason = f"collate raised {type(error).__name__}: {first_line(error)}"
            raise SampleError(indices[0], f"in a batch of {len(pairs)}, {reason}") from error
        if not isinstance(targets, Tensor) or not targets.ndim:
            raise SampleError(
                indices[0],
                f"the targets of collate must be a tensor [n, ...], not {_type_name(targets)}; "
                "what the loss needs besides, such as the boxes of images, can be a part of the "
                "inputs",
            )
        return inputs, targets

    def _read(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            error.add_note(f"while sample {index} was read")
            raise


class Requests:
    """The requests of the current pass. A loader keeps it, and its processes, for all passes."""

    def __init__(self) -> None:
        self.order: Iterable[Tensor] = ()
        self.epoch = EVALUATION

    def __iter__(self) -> Iterator[Request]:
        return ((self.epoch, indices.tolist()) for indices in self.order)


class DatasetSplit:
    """A map-style Dataset as a `Split`.

    Args:
        dataset: Has `__len__` and `__getitem__`, which returns an (input, target) pair. An input is
            a tensor or array, or a tuple or mapping of them; a target is a number, a tensor or an
            array.
        seed: Seeds the random numbers of each sample.
        loader_workers: Processes that read samples; 0: this one does. They start with the first
            batch, and end with this object. None: as many as there are CPUs that training
            does not use, up to 8, if a sample costs more than sending it between processes; the
            Dataset must then be one that can be pickled after samples were read.
        prepare: Turns the inputs of a batch into those of the model, after they were read, so that
            loader processes send a compact form of them (bytes).
        collate: Makes a batch of pairs whose tensors may differ in shape; None: they are stacked.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        seed: int,
        loader_workers: int | None = 0,
        prepare: Callable[[Tensor], Tensor] | None = None,
        collate: Collate | None = None,
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = seed
        self.prepare = prepare
        self._requests = Requests()
        self._reading = False
        self._workers = loader_workers

    @cached_property
    def _loader(self) -> "DataLoader[Batch | SampleError]":
        return self._make_loader(self._requests, self.loader_workers, persistent=True)

    @property
    def loader_workers(self) -> int:
        """Number of processes that read samples; chosen now if it was left open."""
        if self._workers is None:
            self._workers = _choose_workers(
                SeededBatches(self.dataset, self.seed, self.collate), len(self)
            )
        return self._workers

    def _make_loader(
        self, requests: Iterable[Request], workers: int, persistent: bool
    ) -> "DataLoader[Batch | SampleError]":
        return DataLoader(
            SeededBatches(self.dataset, self.seed, self.collate),
            # With batch_size None, what the loader calls a sample index is a whole request.
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            multiprocessing_context=fork_server() if workers else None,
            worker_init_fn=_start_hidden if hasattr(self.dataset, "begin_batch") else start_loader,
            # By default a loader draws a number from the global generator in each pass.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def batches(self, order: Iterable[Tensor], epoch: int | None) -> Iterator[Batch]:
        """As `Split.batches`. Raises RuntimeError if a pass is started while another one runs."""
        if self._reading:
            raise RuntimeError("this split is being read already: finish or close that pass first")
        self._reading = True
        self._requests.order = order
        self._requests.epoch = EVALUATION if epoch is None else epoch
        try:
            yield from self._usable(self._loader)
        finally:
            self._reading = False

    def probe(self, order: Iterable[Tensor]) -> Iterator[Batch]:
        """Batches for evaluation, read by a separate process if loader processes are used.

        A Dataset that opens its files with the first sample could not be sent to loader processes
        after it was read here.
        """
        requests = ((EVALUATION, indices.tolist()) for indices in order)
        workers = min(1, self.loader_workers)
        yield from self._usable(self._make_loader(_Once(requests), workers, persistent=False))

    def _usable(self, batches: Iterable[Batch | SampleError]) -> Iterator[Batch]:
        """The batches, prepared; raises the first SampleError among them.

        Raises:
            ConfigError: The Dataset cannot be sent to loader processes.
        """
        try:
            found = iter(batches)  # starts the processes
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"data.loader_workers={self.loader_workers}: {type(self.dataset).__name__} cannot "
                f"be sent to the loader processes: {first_line(error)}; let it open files and "
                "connections with the first sample, or set data.loader_workers=0"
            ) from error
        while True:
            try:
                batch = next(found, None)
            except Exception as error:
                self._explain(error)
                raise
            if batch is None:
                return
            if isinstance(batch, SampleError):
                raise batch
            inputs, targets = batch
            yield inputs if self.prepare is None else self.prepare(inputs), targets

    def _explain(self, error: Exception) -> None:
        """Name the sample in the notes of an error, also in one of a loader process.

        torch puts the traceback of a loader process into the message. It becomes a note, and the
        message is that of the original error.
        """
        head, found, original = str(error).partition(_LOADER_TRACEBACK)
        if found:
            lines = original.rstrip().splitlines()
            *_, last = [-1, *(i for i, line in enumerate(lines) if line.startswith(" "))]
            message, *notes = lines[last + 1 :] or [head]
            error.args = (message.removeprefix(f"{type(error).__name__}: "),)
            error.__notes__ = [*notes, found.strip() + original]
        error.__notes__ = [
            _READ_SAMPLE.sub(lambda match: f"while {self.sample_name(int(match[1]))} was", note)
            for note in getattr(error, "__notes__", [])
        ]

    def sample_name(self, index: int) -> str:
        """A sample in words, for messages."""
        if hasattr(self.dataset, "sample_name"):  # of a stream
            return str(self.dataset.sample_name(index))
        held_out = isinstance(self.dataset, Subset)
        return name_sample(index, self.dataset.indices[index] if held_out else None)  # type: ignore[attr-defined]

    def listed_targets(self) -> Tensor | None:
        """The targets that the Dataset lists beside its samples, int64 [n]; None: it lists none.

        torchvision's Datasets have `targets` or `labels`. Reading a sample may give another target,
        for instance because of a transform.
        """
        return _listed_targets(self.dataset)


def _start_hidden(number: int) -> None:
    """As `start_loader`, for a process that reads a stream."""
    start_loader(number)
    _hide_worker(number)


def _hide_worker(number: int) -> None:
    """Hide from streams that this is a loader process: they would read only a part of the data."""
    torch.utils.data._utils.worker._worker_info = None


def _choose_workers(batches: SeededBatches, samples: int) -> int:
    """The number of processes that read samples, by the free CPUs and the time for a sample."""
    spare = spare_cpus()
    if spare < 1:
        return 0
    for _ in range(2):  # the first time files are opened and modules imported
        began = time.perf_counter()
        batches[EVALUATION, list(range(min(samples, _TIMED_SAMPLES)))]
        seconds = time.perf_counter() - began
    return min(spare, _MAX_WORKERS) if seconds > _TIMED_SAMPLES * _PROCESS_S else 0


class _Once:
    """An iterator as an iterable, which a loader asks for."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests


def _listed_targets(dataset: Dataset[Any]) -> Tensor | None:
    if isinstance(dataset, Subset):
        whole = _listed_targets(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices)]
    listed = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if not isinstance(listed, Sequence | np.ndarray | Tensor):
        return None
    try:
        targets = torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # strings, or nested lists
        return None
    fits = targets.ndim == 1 and len(targets) == len(dataset)  # type: ignore[arg-type]
    whole_numbers = not (targets.is_floating_point() or targets.is_complex())
    return targets.long() if fits and whole_numbers else None


def _as_it_is(item: Any, index: int) -> Any:
    """An item of a Dataset that returns only pairs (Tensor, class)."""
    return item


def _check_item(item: Any, index: int) -> tuple[Any, Any]:
    """An item of a Dataset as (input, target). Raises SampleError if it is not a pair."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise SampleError(index, f"it must be a pair (input, target), not {_type_name(item)}")
    value, target = item
    try:
        if isinstance(target, np.ndarray | np.generic):
            target = to_tensor(np.asarray(target))
    except TypeError:  # a type of numbers that torch does not have; it is named below
        pass
    if isinstance(target, Tensor):
        known = not target.is_complex()
    else:
        known = isinstance(target, int | float)
    if not known:
        raise SampleError(
            index,
            f"its target must be a number or a tensor, not {_type_name(target)}; what the loss "
            "needs besides, such as the boxes of images, can be a part of the input",
        )
    return _check_input(value, index), target


def _check_input(value: Any, index: int) -> Any:
    """An input, with arrays as tensors. Raises SampleError if it holds anything else."""
    if isinstance(value, Mapping):
        return {key: _check_input(item, index) for key, item in value.items()}
    if isinstance(value, tuple | list) and any(
        isinstance(item, Tensor | np.ndarray | Mapping) for item in value
    ):
        return tuple(_check_input(item, index) for item in value)
    try:
        if isinstance(value, np.ndarray):
            value = to_tensor(value)
    except TypeError:  # as above
        pass
    if not isinstance(value, Tensor) or not (
        value.is_floating_point()
        or value.is_complex()
        or value.dtype in (torch.int32, torch.int64, torch.bool)
    ):
        raise SampleError(
            index,
            f"its input must be a tensor or array of floats (or of int32/int64 tokens), not "
            f"{_type_name(value)}; {_advice(value)}",
        )
    return value


def _advice(value: Any) -> str:
    if type(value).__module__.startswith("PIL."):
        return (
            "give the data set a transform that makes a tensor of an image, such as "
            "torchvision.transforms.ToTensor()"
        )
    return "convert it in the data set"


def _type_name(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype)
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return type(value).__name__


def _stack(values: Sequence[Any], indices: Sequence[int], what: str) -> Any:
    """Tensors, or their tuples or mappings, with a new first dimension.

    Raises:
        SampleError: Shapes or structures differ.
    """

    def stack(tensors: Sequence[Tensor]) -> Tensor:
        if tensors[0].layout != torch.strided:
            raise SampleError(
                indices[0],
                f"its {what} are a sparse tensor; give to_dense() of it, or batches of your own "
                "with data.collate",
            )
        for index, tensor in zip(indices, tensors, strict=True):
            if tensor.shape != tensors[0].shape:
                raise SampleError(
                    index,
                    f"its {what} have the shape {[*tensor.shape]}, those of sample {indices[0]} "
                    f"{[*tensors[0].shape]}; make them equal",
                )
        return torch.stack(list(tensors))

    try:
        return merge(stack, values)
    except SampleError:
        raise
    except ValueError as error:
        raise SampleError(indices[0], f"its {what} differ from those of others: {error}") from error


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
    collate: Collate | None = None,
    seed: int = 0,
) -> Splits:
    """Splits of Datasets whose items are (input, target) pairs: see `trainer.tasks` for targets.

    Args:
        train: Map-style Dataset of the training samples.
        validation: Likewise; None: a part of `train` is held out.
        test: Likewise; None: a part of `train` is held out.
        hold_out: Fraction of `train` in each part that is held out, by a fixed permutation. Such a
            part passes through the same `__getitem__` as `train`, augmentation included.
        loader_workers: Processes per worker and split that read samples; 0: the worker does.
        collate: Makes a batch of a list of (input, target) pairs, such as `trainer.data.Pad` for
            samples of different lengths; None: they are stacked.
        seed: Seeds the random numbers of each sample.

    Raises:
        ValueError: A Dataset is not map-style, or a number is out of range.
    """
    for key, value in (("train", train), ("validation", validation), ("test", test)):
        if isinstance(value, DataLoader):
            raise ValueError(f"data.{key} {NO_LOADER}")
        absent = value is None and key != "train"
        by_index = hasattr(value, "__len__") and hasattr(value, "__getitem__")
        if not absent and (not by_index or isinstance(value, IterableDataset)):
            raise ValueError(
                f"data.{key}: {type(value).__name__} is not a map-style data set: it needs "
                "__len__ and __getitem__; for streams, use data=stream (trainer.data.stream)"
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
        return DatasetSplit(samples, seed, loader_workers, collate=collate)

    return Splits(train=split(rest), validation=split(validation), test=split(test))
