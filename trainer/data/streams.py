"""Streams: samples that can only be read in order, such as those of torch's IterableDataset.

Every worker reads the whole stream and uses its share of each global batch, so that the batches are
the same for any number of workers. Reading is a function of (seed, pass, number of the sample):
torch's, NumPy's and Python's generators are seeded with them before a sample is read. A resumed run
therefore reads the same samples as an undisturbed one, after skipping those before.
"""

import copy
import hashlib
import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainer.data.datasets import DatasetSplit, preserved_generators, seed_generators
from trainer.data.hashing import mix
from trainer.data.order import permutation
from trainer.data.split import SampleError, Split, unwrapped
from trainer.data.tree import map_tensors

Source = Iterable[Any] | Callable[[], Iterable[Any]]
"""Yields the samples of one pass each time it is iterated; or a function that returns them."""

Place = tuple[int, int]  # first pass of the sequence of samples, position in the sequence

_MARK_EVERY = 256  # samples between states of the source that are kept
_COMPARED = 4  # samples after a state that show whether it is exact
_READ, _SHUFFLE = 0x72656164, 0x73687566  # separate the seeds of different draws


def is_stream(value: Any) -> bool:
    """Whether samples of `value` can only be read in order."""
    if isinstance(value, IterableDataset):
        return True
    if isinstance(value, DataLoader):  # of batches
        return False
    by_index = hasattr(value, "__getitem__") or hasattr(value, "batches")
    return not by_index and (callable(value) or hasattr(value, "__iter__"))


class Stream(Dataset[tuple[Any, Any]]):
    """A stream as the Dataset of a `DatasetSplit`, with samples by their number in an epoch.

    Without `steps_per_epoch`, epoch e is pass e over the source. With it, epochs are consecutive
    parts of the sequence of all passes. Reading backwards begins the pass, or the sequence, again.

    Args:
        source: What to read. `set_epoch(pass)` is called before each pass, if it exists.
        seed: Seeds the order and the random numbers of the samples.
        transform: Converts what the source yields to (input, target); called only for samples that
            this worker uses. None: the source yields such pairs.
        steps_per_epoch: Optimizer steps in an epoch; None: an epoch is a pass.
        shuffle_buffer: Samples are shuffled in groups of this size; 0: not shuffled.
        limit: Maximum number of samples in a pass; None: no maximum.

    Raises:
        ValueError: The source can be iterated only once.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        transform: Callable[[Any], tuple[Any, Any]] | None = None,
        steps_per_epoch: int | None = None,
        shuffle_buffer: int = 0,
        limit: int | None = None,
    ) -> None:
        if isinstance(source, Iterator):
            raise ValueError(
                f"a {type(source).__name__} can be read only once: give an IterableDataset, or the "
                "function that makes the iterator (in YAML: {_target_: ..., _partial_: true})"
            )
        self.source = source
        self._seed = seed
        self._transform = transform
        self._steps = steps_per_epoch
        self._group = max(1, shuffle_buffer)
        self._limit = limit
        self._samples: int | None = None  # of an epoch
        self._start: dict[str, Any] | None = None  # a state from which to continue
        self.forget()

    def forget(self) -> None:
        """Forget what was read, so that the source is opened anew."""
        self._cursor: _Cursor | None = None
        self._loaded: tuple[Place, list[tuple[str, Any]]] | None = None  # a group, shuffled
        self._marks: list[dict[str, Any]] = []  # the last states before groups
        self._first: dict[Place, tuple[str, Any]] = {}  # the first sample of all, read often
        self._held: dict[Place, tuple[str, Any]] = {}  # what the last batch needed
        self._places: dict[int, Place] = {}  # of that batch, by number in the epoch

    def __getstate__(self) -> dict[str, Any]:
        other = object.__new__(Stream)
        other.__dict__.update(self.__dict__)
        other.forget()  # iterators cannot be pickled
        return other.__dict__

    @property
    def draws(self) -> bool:
        """Whether the caller must seed the generators for each sample: `transform` is seeded here,
        by the place of the sample in the sequence instead of its number in the epoch."""
        return self._transform is None

    def apart(self) -> "Stream":
        """A stream of the same samples, which can be read without moving this one.

        Reading this stream backwards would make it read all earlier samples again. The source is
        copied; if it cannot be, both streams share it, and that happens after all.
        """
        other = copy.copy(self)
        try:
            other.source = copy.deepcopy(self.source)
        except Exception:  # the source's class may raise anything
            self.forget()  # a source need not allow two iterators at a time
        return other

    def __len__(self) -> int:
        """Samples in an epoch; if the source does not know them, it is read once to count them.

        Raises:
            TypeError: There is no batch size yet, from which `steps_per_epoch` gives the length.
        """
        if self._samples is None and self._steps is not None:
            raise TypeError(
                "the length of this stream is data.steps_per_epoch times the batch size, which is "
                "not known before the data are those of an experiment"
            )
        if self._samples is None:
            known = source_length(self.source)
            if known is None:
                with preserved_generators():
                    passes = _Cursor(self.source, self._seed, 0, endless=False)
                    known = sum(1 for _ in islice(passes, self._limit))
            self._samples = known if self._limit is None else min(known, self._limit)
        return self._samples

    def set_batch_size(self, batch_size: int) -> None:
        """Fix the length of a training epoch.

        Raises:
            ValueError: It is unknown.
        """
        if self._steps is not None:
            self._samples = self._steps * batch_size
        elif source_length(self.source) is None:
            raise ValueError(
                "data.train: the length of this stream is unknown, so the learning-rate schedule "
                "is too; set data.steps_per_epoch, or give its class a __len__ that returns the "
                "number of samples"
            )

    def begin_batch(self, epoch: int, indices: Sequence[int]) -> None:
        """Read the samples of a batch, which `__getitem__` then returns.

        Args:
            epoch: -1: for evaluation, the first pass.
            indices: Numbers in the epoch.
        """
        epoch = max(0, epoch)
        if self._steps is None:
            self._places = {index: (epoch, index) for index in indices}
        else:
            self._places = {index: (0, epoch * len(self) + index) for index in indices}
        known = self._first | self._held
        self._held = {}
        for index, place in sorted(self._places.items()):
            self._held[place] = known[place] if place in known else self._read(index, place)
        if (0, 0) in self._held:
            self._first = {(0, 0): self._held[0, 0]}

    def __getitem__(self, index: int) -> Any:
        _, sample = self._held[self._places[index]]
        if self._transform is None:
            return sample
        seed_generators(mix(self._seed, *self._places[index]))
        return self._transform(sample)

    def sample_name(self, index: int) -> str:
        """A sample in words: its number in the epoch, and in the stream if that was just read."""
        held = self._held.get(self._places.get(index, (-1, -1)))
        return f"sample {index}" if held is None else f"sample {index} ({held[0]})"

    def state(self) -> str | None:
        """A state of the source from which later samples can be read, as JSON; None: there is none.

        With it are stored digests of the samples that followed: they show whether reading from the
        state is exact, which it may not be, for example with a shuffle buffer.
        """
        for mark in reversed(self._marks):
            if len(mark["digests"]) == _COMPARED and all(mark["digests"]):
                return json.dumps(mark)
        return None

    def load_state(self, state: str) -> None:
        """Continue from a state instead of the beginning, whenever later samples are read."""
        self._start = json.loads(state)

    def _read(self, index: int, place: Place) -> tuple[str, Any]:
        first, position = place
        number, offset = divmod(position, self._group)
        if self._loaded is None or self._loaded[0] != (first, number):
            self._loaded = (first, number), self._load(first, number)
        group = self._loaded[1]
        if offset >= len(group):
            assert self._cursor is not None
            length = self._cursor.position
            reason = "the stream is empty"
            if length:
                reason = f"the stream ended after {length} samples, although its length is "
                reason += f"{len(self)}; correct its length, or set data.steps_per_epoch"
            raise SampleError(index, reason)
        return group[offset]

    def _load(self, first: int, number: int) -> list[tuple[str, Any]]:
        """Group `number` of a sequence, shuffled; shorter at the end, and empty after it."""
        begin, size = number * self._group, self._group
        if self._cursor is None or self._cursor.first != first or self._cursor.position > begin:
            self._cursor, self._marks = self._open(first, begin), []
        for _ in islice(self._cursor, begin - self._cursor.position):
            pass
        marked = self._marks[-1]["position"] if self._marks else 0
        if begin - marked >= _MARK_EVERY and (mark := self._cursor.mark()):
            self._marks = [*self._marks[-1:], mark]
        group = list(islice(self._cursor, size))
        if size == 1:
            return group
        order = permutation(len(group), mix(self._seed, _SHUFFLE, first), number)
        return [group[i] for i in order.tolist()]

    def _open(self, first: int, begin: int) -> "_Cursor":
        """A cursor at `begin` or before it: in the given state if that is exact, or at 0."""
        arguments = self.source, self._seed, first, self._steps is not None
        mark = self._start
        if mark is not None and mark["first"] == first and mark["position"] <= begin:
            try:
                tried = _Cursor(*arguments, mark)
                found = [_digest(sample) for _, sample in islice(tried, _COMPARED)]
                if found == mark["digests"]:
                    return _Cursor(*arguments, mark)
            except Exception:  # the source cannot be copied, or refuses its state: no state at all
                pass
            self._start = None
        return _Cursor(*arguments)


class _Cursor(Iterator[tuple[str, Any]]):
    """Reads a source from the beginning of pass `first`, or from a state.

    Yields the place of each sample in words, and the sample.

    Attributes:
        first: The pass with which the sequence began.
        position: Samples read, or skipped by means of a state, since then.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        first: int,
        endless: bool,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.first = self._pass = first
        self.position = self._number = 0
        self._source = self._open = source
        self._seed = seed
        self._endless = endless
        self._items: Iterator[Any] | None = None
        self._digests: list[str | None] | None = None  # of the last mark
        self._refused = False  # whether the source had no state that can be kept
        if state is not None:
            self.position, self._pass, self._number = (
                state[key] for key in ("position", "pass", "number")
            )
            self._open = copy.deepcopy(source)  # the source itself still begins at the beginning
            _set_epoch(self._open, self._pass)
            self._open.load_state_dict(state["source"])  # type: ignore[union-attr]
            self._items = iter(self._open)  # type: ignore[arg-type]

    def __next__(self) -> tuple[str, Any]:
        try:
            if self._items is None:
                seed_generators(mix(self._seed, _READ, self._pass))
                self._open = self._source
                _set_epoch(self._open, self._pass)
                made = self._open if hasattr(self._open, "__iter__") else self._open()
                self._items = iter(made)
            seed_generators(mix(self._seed, _READ, self._pass, self._number))
            sample = next(self._items)
        except StopIteration:
            if not self._endless or self._number == 0:
                raise
            self._items, self._number, self._pass = None, 0, self._pass + 1
            return next(self)
        except Exception as error:
            error.add_note(f"while {self._name()} was read")
            raise
        name = self._name()
        self.position += 1
        self._number += 1
        if self._digests is not None and len(self._digests) < _COMPARED:
            self._digests.append(_digest(sample))
        return name, sample

    def _name(self) -> str:
        return f"number {self._number} in pass {self._pass} of the stream"

    def mark(self) -> dict[str, Any] | None:
        """A state from which a cursor can continue; None if the source has none.

        The digests of the next samples are added to it when they are read.
        """
        source: Any = self._open
        stateful = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        if self._items is None or not stateful or self._refused:
            return None
        try:
            state = source.state_dict()
            copied = json.loads(json.dumps(state))
            self._refused = bool(copied != state)
        except Exception:  # JSON cannot hold the state, or the method needs arguments, or it fails
            self._refused = True
        if self._refused:
            return None
        self._digests = []
        return {
            "first": self.first,
            "position": self.position,
            "pass": self._pass,
            "number": self._number,
            "source": copied,
            "digests": self._digests,
        }


def _plain(tensor: Tensor) -> Any:
    """A tensor as a value that is always pickled alike."""
    return str(tensor.dtype), tensor.tolist()


def _digest(sample: Any) -> str | None:
    """A digest of a sample, which is the same in every process; None: it cannot be pickled."""
    content = io.BytesIO()
    pickler = pickle.Pickler(content, protocol=4)
    pickler.fast = True  # equal values are written alike, whether they are one object or several
    try:
        pickler.dump(map_tensors(_plain, sample))
    except Exception:  # the classes of samples may raise anything
        return None
    return hashlib.sha256(content.getvalue()).hexdigest()


def source_length(source: Any) -> int | None:
    """The number of samples in a pass; None if the source does not know it."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def _set_epoch(source: Any, number: int) -> None:
    if hasattr(source, "set_epoch"):
        source.set_epoch(number)


def stream_of(split: Any) -> Stream | None:
    """The stream that a split, perhaps in wrappers, reads; None if it is another split."""
    dataset = getattr(unwrapped(split), "dataset", None)
    return dataset if isinstance(dataset, Stream) else None


def apart(split: Split, most_workers: int | None = None) -> Split:
    """A split of the same samples, which can be read without moving the stream of `split`.

    Samples that do not come from a stream can be read in any order: such a split is returned as it
    is.

    Args:
        split: What to read apart.
        most_workers: Maximum number of loader processes, if it is a stream; None: those of `split`.
    """
    stream = stream_of(split)
    if stream is None or not isinstance(unwrapped(split), DatasetSplit):
        return split
    if isinstance(split, DatasetSplit):
        workers = split.loader_workers
        if most_workers is not None:
            workers = min(workers, most_workers)
        return DatasetSplit(stream.apart(), split.seed, workers, split.prepare, split.collate)
    other: Any = copy.copy(split)  # a wrapper
    other.split = apart(other.split, most_workers)
    return other  # type: ignore[no-any-return]
