"""Streams: the same samples for any number of workers, loader requests, and resumed reading."""

import copy
import pickle
import random
from itertools import chain, count, islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from trainer.data.checked import CheckedSplit
from trainer.data.datasets import DatasetSplit, _hide_worker, dataset
from trainer.data.mixed import MixedSplit
from trainer.data.order import global_batches, shard
from trainer.data.sources import as_splits
from trainer.data.split import unwrapped
from trainer.data.streaming import stream
from trainer.data.streams import apart, stream_of
from trainer.worker.phase import observed


class Numbers(IterableDataset[Any]):
    """Yields (number, random number) and the class; counts what is read."""

    def __init__(self, n: int | None = 20, known: bool = False) -> None:
        self.n = n
        self.read = 0
        if known:
            self.__class__ = Sized

    def __iter__(self) -> Any:
        for number in count() if self.n is None else range(self.n):
            self.read += 1
            yield torch.tensor([number, random.random()]), number % 10


class Sized(Numbers):
    def __len__(self) -> int:
        assert self.n is not None
        return self.n


class Stateful(Numbers):
    """Can continue anywhere, and begins there again after that, as some streams do."""

    begin = at = 0

    def __iter__(self) -> Any:
        for number in range(self.begin, self.n or 0):
            self.read, self.at = self.read + 1, number
            yield torch.tensor([number, random.random()]), number % 10

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at + 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["at"]


TEST = (torch.zeros(3, 2), torch.zeros(3).long())


def split_of(source: Any, batch_size: int = 6, **settings: Any) -> Any:
    split = stream(source, TEST, TEST, seed=3, **settings).train
    found = stream_of(split)
    assert found is not None
    found.set_batch_size(batch_size)
    return split


def read(split: Any, order: Any, epoch: int | None = 0) -> torch.Tensor:
    return torch.cat([inputs for inputs, _ in split.batches(list(order), epoch)])


def batches(split: Any, epoch: int) -> list[torch.Tensor]:
    return global_batches(len(split), 6, 3, epoch, shuffled=False)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"steps_per_epoch": 4},
    {"shuffle_buffer": 7},
    {"steps_per_epoch": 4, "shuffle_buffer": 7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batches_of_one_and_a_resumed_one_continues(
    ranks: int, settings: dict[str, Any]
) -> None:
    whole = split_of(Numbers(known=True), **settings)
    shared = [split_of(Numbers(known=True), **settings) for _ in range(ranks)]
    resumed = split_of(Numbers(known=True), **settings)
    seen = []
    for epoch in range(3):
        order = batches(whole, epoch)
        rows = [read(whole, [batch], epoch) for batch in order]
        parts = [
            read(split, [shard(b, rank, ranks) for b in order], epoch).split(
                [len(shard(b, rank, ranks)) for b in order]
            )
            for rank, split in enumerate(shared)
        ]
        for number, row in enumerate(rows):
            assert torch.equal(row, torch.cat([part[number] for part in parts]))
        seen.append(torch.cat(rows))
    assert torch.equal(read(resumed, batches(whole, 2)[1:], 2), seen[2][6:])
    numbers = [part[:, 0].tolist() for part in seen]
    assert (numbers[0][:20] == list(range(20))) == ("shuffle_buffer" not in settings)
    if "steps_per_epoch" not in settings:
        assert [sorted(part) for part in numbers] == [list(range(20))] * 3
    elif "shuffle_buffer" not in settings:
        assert [*chain(*numbers)] == [number % 20 for number in range(72)]
    assert not torch.equal(seen[0], seen[1])  # other random numbers, and another order


def test_reading_is_one_pass_and_only_used_samples_are_converted() -> None:
    converted = []

    def convert(sample: Any) -> Any:
        converted.append(int(sample[0][0]))
        return sample[0] + torch.rand(2), sample[1]

    source = Numbers(known=True)
    split = split_of(source, transform=convert)
    first = read(split, [torch.tensor([2, 3]), torch.tensor([3]), torch.tensor([9])])
    assert (source.read, converted) == (10, [2, 3, 3, 9])
    assert torch.equal(first[1], first[2])  # its random numbers are its own
    read(split, [torch.tensor([0])], None)
    assert source.read == 11  # the first sample, from a new pass
    read(split, [torch.tensor([1])], None)
    read(split, [torch.tensor([0])], None)
    assert source.read == 12  # it is kept


def test_mixed_batches_read_partners_without_a_new_pass() -> None:
    source = Numbers(known=True)
    split = MixedSplit(split_of(source), 0.4, 0.0, seed=3, batch_size=6)
    for mixed, _ in split.batches([torch.tensor([3, 4]), torch.tensor([5])], 0):
        mixed["inputs"] = mixed["inputs"][:, 0].tolist()
        assert mixed["inputs"] == ([3, 4, 2, 5] if len(mixed["inputs"]) == 4 else [5, 4])
    assert source.read == 6


class Losing(Stateful):
    """Its state forgets a sample, as that of a shuffle buffer does."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at + 2}


class Odd(Stateful):
    """JSON cannot hold its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": torch.tensor(self.at + 1)}


class Refusing(Stateful):
    """It refuses its own state, as after an update of the library that wrote it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("shard")


class NoCopy(Stateful):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle 'socket' object")


class Asking(Stateful):
    """Its state depends on an argument, as in MosaicML's streaming."""

    def state_dict(self, samples: int) -> dict[str, Any]:  # type: ignore[override]
        return {"at": samples}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", [Stateful, Losing, Odd, Refusing, NoCopy, Asking])
def test_a_stream_continues_from_its_state_if_that_is_exact(
    kind: type[Stateful], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.streams._MARK_EVERY", 5)
    monkeypatch.setattr("trainer.data.streams.source_length", lambda source: source.n)
    whole, begun = split_of(kind(), **settings), split_of(kind(), **settings)
    order = batches(whole, 1)
    expected = read(whole, order, 1)
    read(begun, batches(begun, 0), 0)
    read(begun, order[:2], 1)
    state = stream_of(begun).state()
    assert (state is None) == (kind in (Odd, Asking))
    resumed = split_of(kind(), **settings)
    if state is not None:
        stream_of(resumed).load_state(state)
    assert torch.equal(read(resumed, order[2:3], 1), expected[12:18])
    assert (stream_of(resumed)._start is None) == (kind is not Stateful)
    assert torch.equal(read(resumed, order[3:], 1), expected[18:])
    assert torch.equal(read(resumed, batches(whole, 2), 2), read(whole, batches(whole, 2), 2))
    assert torch.equal(read(resumed, order, 1), expected)  # backwards


def test_a_state_saves_reading() -> None:
    source = Stateful(10**9)
    begun = split_of(source, steps_per_epoch=100)
    read(begun, [torch.arange(501)])
    state = stream_of(begun).state()
    assert source.read == 501
    split = split_of(Stateful(10**9), steps_per_epoch=100)
    stream_of(split).load_state(state)
    assert read(split, [torch.tensor([502])])[0, 0] == 502
    assert stream_of(split)._cursor._open.read == 503 - 256
    assert stream_of(split_of(Numbers(known=True))).state() is None


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_samples_are_observed_without_moving_the_stream(settings: dict[str, Any]) -> None:
    source, alone = Stateful(20), split_of(Sized(20), **settings)
    source.__class__ = type("Known", (Stateful, Sized), {})
    split = CheckedSplit(split_of(source, **settings), "train", lambda targets: None)
    runtime: Any = SimpleNamespace(seed=3, batch_size=6, place_batch=lambda *batch: batch)
    order = batches(alone, 0)
    assert torch.equal(read(split, order[:2]), read(alone, order[:2]))
    reads = source.read
    seen = torch.cat(observed(split, 5, runtime))
    assert torch.equal(seen, read(alone, [torch.arange(5)], None))
    assert source.read == reads
    assert torch.equal(read(split, order[2:]), read(alone, order[2:]))
    assert source.read == len(split) if "steps_per_epoch" not in settings else source.read <= 28


def test_a_stream_that_cannot_be_copied_is_read_again_after_its_samples_were_observed() -> None:
    source = NoCopy(20)
    split, alone = (split_of(one, steps_per_epoch=3) for one in (source, Numbers(20)))
    read(split, [torch.arange(9)])
    assert read(apart(split), [torch.arange(5)], None)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert source.read == 9 + 5
    assert torch.equal(read(split, [torch.arange(9, 12)]), read(alone, [torch.arange(9, 12)]))
    assert source.read == 9 + 5 + 12


def test_samples_of_loader_processes_are_observed_in_a_process_of_their_own() -> None:
    split = stream(Numbers(known=True), TEST, TEST, loader_workers=3).train
    for most, workers in ((None, 3), (1, 1)):
        other = apart(split, most)
        assert isinstance(other, DatasetSplit)
        assert (other.loader_workers, stream_of(other) is stream_of(split)) == (workers, False)
    tensors = as_splits(TEST, hold_out=0.4).train
    assert apart(tensors) is tensors


def test_generators_are_seeded_once_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    for convert, places in ((None, "datasets"), (lambda sample: sample, "streams")):
        split = split_of(Numbers(known=True), transform=convert)
        read(split, [torch.tensor([0])])
        seeds: dict[str, list[int]] = {"datasets": [], "streams": []}
        for module, found in seeds.items():
            monkeypatch.setattr(f"trainer.data.{module}.seed_generators", found.append)
        read(split, [torch.tensor([1, 2])])
        wanted = {"datasets": 0, "streams": 2}  # while the stream is read
        wanted[places] += 2
        assert {module: len(found) for module, found in seeds.items()} == wanted
        monkeypatch.undo()


class Unsized(Numbers):
    def __len__(self) -> int:
        raise TypeError("length unknown")


def test_the_length_of_an_epoch_is_known_with_the_batch_size() -> None:
    split = stream(Unsized(None), TEST, TEST, steps_per_epoch=4).train
    with pytest.raises(TypeError, match=r"data\.steps_per_epoch times the batch size"):
        len(split)  # rather than counting the samples of a stream that may be endless
    stream_of(split).set_batch_size(6)  # type: ignore[union-attr]
    assert len(split) == 24
    with pytest.raises(ValueError, match=r"length of this stream is unknown.*steps_per_epoch"):
        split_of(Unsized(9))
    assert len(stream(Numbers(), Unsized(9), TEST).validation) == 9


def test_attributes_with_the_name_split_are_no_wrappers() -> None:
    class Half:  # a Split of the user's own, of a part with a name
        split = "train"

        def batches(self) -> None: ...

    half = Half()
    assert unwrapped(half) is half
    assert unwrapped(MixedSplit(half, 0.4, 0.0, seed=3, batch_size=6)) is half  # type: ignore


def test_evaluation_counts_streams_of_unknown_length() -> None:
    made = as_splits((Numbers(known=True), Numbers(7), lambda: iter(Numbers(5))))
    assert [len(split) for split in vars(made).values()] == [20, 7, 5]
    assert read(made.test, [torch.arange(5)], None)[:, 0].tolist() == [0, 1, 2, 3, 4]
    limited = stream(Numbers(), Numbers(None), TEST, evaluation_samples=9)
    assert [len(limited.validation), len(limited.test)] == [9, 3]
    again = [read(limited.validation, [torch.arange(9)], None) for _ in range(2)]
    assert torch.equal(*again)


def test_the_callers_generators_are_left_alone() -> None:
    before = random.getstate(), torch.get_rng_state()
    split = stream(Numbers(), Numbers(7), TEST).validation
    assert len(split) == 7
    read(split, [torch.tensor([1, 2])])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_it_can_be_pickled_in_the_middle_of_a_pass() -> None:
    split = split_of(Numbers(known=True))
    read(split, [torch.tensor([3])])
    other = pickle.loads(pickle.dumps(stream_of(split)))
    assert other._cursor is None
    assert copy.deepcopy(stream_of(split))._held == {}
    assert stream_of(split)._cursor is not None


def test_streams_do_not_see_that_a_loader_process_reads_them() -> None:
    module = torch.utils.data._utils.worker
    try:
        module._worker_info = 3
        _hide_worker(0)
        assert torch.utils.data.get_worker_info() is None
    finally:
        module._worker_info = None


class Short(Numbers):
    """Declares more than there is."""

    def __len__(self) -> int:
        return 30


class Failing(Numbers):
    def __iter__(self) -> Any:
        yield from islice(super().__iter__(), 2)
        raise OSError("connection reset")


def test_errors_name_the_sample() -> None:
    with pytest.raises(ValueError, match=r"sample 20: the stream ended after 20 samples, although"):
        read(split_of(Short()), [torch.tensor([19, 20])])
    with pytest.raises(ValueError, match=r"sample 22: the stream ended after 20 samples"):
        read(split_of(Short(), shuffle_buffer=21), [torch.tensor([22])])
    with pytest.raises(ValueError, match=r"sample 0: the stream is empty"):
        read(split_of(Numbers(0), steps_per_epoch=3), [torch.tensor([0])])
    with pytest.raises(OSError, match="connection reset") as caught:
        read(split_of(Failing(), steps_per_epoch=3), [torch.tensor([0, 2])])
    assert caught.value.__notes__ == ["while number 2 in pass 0 of the stream was read"]
    split = split_of(lambda: [(torch.zeros(1), 0), (torch.zeros(2), 0)], steps_per_epoch=2)
    with pytest.raises(ValueError, match=r"sample 1: its inputs have the shape \[2\]"):
        read(split, [torch.tensor([0, 1])], 1)
    assert split.sample_name(1) == "sample 1 (number 1 in pass 6 of the stream)"
    assert split.sample_name(9) == "sample 9"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a list_iterator can be read only once.*_partial_: true"):
        stream(iter([1]), TEST, TEST)
    with pytest.raises(ValueError, match=r"data.train: a tuple is not a stream; use data=dataset"):
        stream(TEST, TEST, TEST)
    loader = DataLoader(Numbers(known=True), batch_size=2)
    for name, make in (
        ("data", lambda: as_splits(loader)),
        ("data.train", lambda: as_splits((loader, loader, loader))),
        ("data.train", lambda: as_splits({"train": loader})),
        ("data.test", lambda: as_splits((Numbers(known=True), TEST, loader))),
        ("data.train", lambda: stream(loader, TEST, TEST)),
        ("data.validation", lambda: stream(Numbers(), loader, TEST)),
        ("data.train", lambda: dataset(loader)),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=rf"^{name} is a DataLoader, but.*loader.dataset"):
            make()
    with pytest.raises(ValueError, match=r"data.steps_per_epoch=0: it must be at least 1"):
        stream(Numbers(), TEST, TEST, steps_per_epoch=0)
    with pytest.raises(ValueError, match=r"Numbers is not a map-style data set.*data=stream"):
        as_splits({"train": Numbers(), "test": TEST})
    with pytest.raises(ValueError, match=r"length of this stream is unknown.*steps_per_epoch"):
        split_of(Numbers())
    with pytest.raises(ValueError, match=r"data is a Numbers: .*IterableDataset must be one of"):
        as_splits(Numbers())
