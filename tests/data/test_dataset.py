"""Any torch Dataset as splits: seeds per sample, loader processes, errors that name the sample."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch.utils.data import Dataset, IterableDataset, Subset

from trainer.data.datasets import DatasetSplit, dataset
from trainer.errors import ConfigError


class Noisy(Dataset[tuple[torch.Tensor, int]]):
    """Draws from all three generators that augmentations use."""

    def __init__(self, n: int = 20) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        draws = [index, float(torch.rand(())), random.random(), np.random.rand()]
        return torch.tensor(draws, dtype=torch.float64), index % 10


class Listed(Dataset[Any]):
    """Gives back the items of a list."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Image:
    """In the place of PIL's."""

    __module__ = "PIL.Image"


def read(split: Any, order: list[list[int]], epoch: int | None = 0) -> list[torch.Tensor]:
    return [inputs for inputs, _ in split.batches([torch.tensor(i) for i in order], epoch)]


def test_random_numbers_belong_to_the_sample_not_to_its_batch() -> None:
    split = DatasetSplit(Noisy(), seed=3)
    whole = read(split, [[4, 9, 2, 7]])[0]
    parts = read(split, [[2], [9, 4], [7]])
    by_index = {int(row[0]): row for row in torch.cat(parts)}
    for row in whole:
        assert torch.equal(row, by_index[int(row[0])])


def test_random_numbers_change_with_sample_epoch_and_seed() -> None:
    split = DatasetSplit(Noisy(), seed=3)
    first = read(split, [[1, 2]], epoch=0)[0]
    variants = [
        first[0, 1:],
        first[1, 1:],
        read(split, [[1]], epoch=1)[0][0, 1:],
        read(split, [[1]], epoch=None)[0][0, 1:],
        read(DatasetSplit(Noisy(), seed=4), [[1]])[0][0, 1:],
    ]
    for column in range(3):
        assert len({float(v[column]) for v in variants}) == len(variants)


def test_the_callers_generators_are_left_alone() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    read(DatasetSplit(Noisy(), seed=3), [[1, 2], [3]])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


@pytest.mark.integration
def test_loader_processes_give_the_same_batches_pass_after_pass() -> None:
    alone, helped = DatasetSplit(Noisy(), seed=3), DatasetSplit(Noisy(), seed=3, loader_workers=2)
    order = [[4, 9, 2], [], [7], [1, 0, 3], [5, 6]]
    empty_safe = [torch.tensor(i, dtype=torch.int64) for i in order]
    for a, b in zip(alone.probe(empty_safe), helped.probe(empty_safe), strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(a, b, strict=True))
    assert helped._loader._iterator is None  # the processes of `batches` have not been started
    early = helped.batches(empty_safe, 0)
    next(early)
    early.close()  # what max_steps does in the middle of an epoch
    for epoch in (0, 1, None):
        expected = list(alone.batches(empty_safe, epoch))
        found = list(helped.batches(empty_safe, epoch))
        assert len(found) == len(order)
        for (a, b), (c, d) in zip(expected, found, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)


@pytest.mark.integration
def test_an_error_in_a_loader_process_reaches_the_caller() -> None:
    items = [(torch.zeros(2), 0), (torch.zeros(3), 0)]
    split = DatasetSplit(Listed(items), seed=0, loader_workers=1)
    with pytest.raises(
        ValueError,
        match=r"^sample 1: its inputs have the shape \[3\]",
    ):
        read(split, [[0, 1]])
    with pytest.raises(IndexError, match="list index out of range") as raised:
        read(split, [[7]])
    assert str(raised.value) == "list index out of range"
    reading, original = raised.value.__notes__
    assert reading == "while sample 7 was read"
    assert original.startswith("Original Traceback (most recent call last):")


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_a_data_set_that_cannot_be_sent_to_loader_processes_is_named() -> None:
    data = Listed([(torch.zeros(2), 0)])
    data.lock = threading.Lock()  # type: ignore[attr-defined]
    split = DatasetSplit(data, seed=0, loader_workers=1)
    with pytest.raises(ConfigError, match=r"Listed cannot be sent .*lock.*loader_workers=0"):
        read(split, [[0]])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(2), "sample 1: it must be a pair"),
        ((torch.zeros(2), 0, 0), "sample 1: it must be a pair"),
        (("image", 0), "sample 1: its input must be a tensor or array of floats"),
        ((torch.zeros(2, dtype=torch.uint8), 0), "not torch.uint8; convert it in the data set"),
        ((torch.zeros(2), "cat"), "sample 1: its target must be a number or a tensor, not str"),
        ((torch.zeros(2), None), "its target must be a number or a tensor, not NoneType"),
        ((torch.zeros(2), torch.tensor(1j)), "its target must be a number or a tensor, not torch"),
        ((np.zeros(2, dtype=np.longdouble), 0), "not an array of float128; convert it"),
        ((np.array(["a", "b"]), 0), "not an array of <U1"),
        ((torch.zeros(2), np.array("a")), "a number or a tensor, not an array of <U1"),
        ((Image(), 0), r"not Image; give the data set a transform .*ToTensor\(\)"),
        (
            (torch.zeros(3), 0),
            r"inputs have the shape \[3\], those of sample 0 \[2\]; make",
        ),
        ((torch.zeros(2), torch.zeros(4).long()), "sample 1: its targets have the shape"),
    ],
)
def test_names_the_sample_that_does_not_fit(item: Any, message: str) -> None:
    split = DatasetSplit(Listed([(torch.zeros(2), 0), item]), seed=0)
    with pytest.raises(ValueError, match=message):
        read(split, [[0, 1]])


@pytest.mark.parametrize(
    "target", [2, np.int32(2), np.array(2), torch.tensor(2, dtype=torch.uint8)]
)
def test_arrays_and_any_integer_target_will_do(target: Any) -> None:
    split = DatasetSplit(Listed([(np.ones(3, dtype=np.float32), target)]), seed=0)
    ((inputs, targets),) = split.batches([torch.tensor([0])], None)
    assert torch.equal(inputs, torch.ones(1, 3))
    assert torch.equal(targets, torch.tensor([2]))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.arange(5, -1, -1, dtype=np.float32).reshape(2, 3)[::-1, ::-1],
        np.broadcast_to(np.arange(3, dtype=np.float32), (2, 3)),  # read-only
    ],
    ids=["big-endian float32", "big-endian float64", "mirrored", "read-only"],
)
def test_arrays_that_torch_cannot_share_are_copied(
    array: np.ndarray[Any, Any], recwarn: pytest.WarningsRecorder
) -> None:
    split = DatasetSplit(Listed([(array, np.array(3, dtype=">i8"))]), seed=0)
    ((inputs, targets),) = split.batches([torch.tensor([0])], None)
    assert inputs[0].tolist() == array.tolist()
    assert inputs.dtype == (torch.float64 if array.itemsize == 8 else torch.float32)
    assert targets.tolist() == [3]
    assert not recwarn.list


def test_an_error_of_the_data_set_says_at_which_sample() -> None:
    split = DatasetSplit(Listed([(torch.zeros(2), 0)]), seed=0)
    with pytest.raises(IndexError) as raised:
        read(split, [[0, 7]])
    assert raised.value.__notes__ == ["while sample 7 was read"]


def test_a_held_out_sample_is_named_by_both_its_numbers() -> None:
    assert DatasetSplit(Noisy(), seed=0).sample_name(2) == "sample 2"
    held_out = DatasetSplit(Subset(Noisy(), [5, 9, 12]), seed=0)
    assert held_out.sample_name(2).startswith("sample 2 (number 12 of the data set")


@pytest.mark.parametrize(
    ("name", "listed", "expected"),
    [
        ("targets", [3, 1, 2], [3, 1, 2]),
        ("labels", np.array([3, 1, 2]), [3, 1, 2]),
        ("targets", torch.tensor([3, 1, 2]), [3, 1, 2]),
        ("targets", [3, 1], None),  # not of all samples
        ("targets", [0.5, 1.0, 2.0], None),
        ("targets", ["a", "b", "c"], None),
        ("targets", [[1, 2], [3], []], None),
        ("targets", lambda: None, None),
    ],
)
def test_targets_that_a_data_set_lists(name: str, listed: Any, expected: list[int] | None) -> None:
    data = Listed([0, 0, 0])
    setattr(data, name, listed)
    found = DatasetSplit(data, seed=0).listed_targets()
    assert (None if found is None else found.tolist()) == expected
    part = DatasetSplit(Subset(data, [2, 0]), seed=0).listed_targets()
    assert (None if part is None else part.tolist()) == (expected and [expected[2], expected[0]])


def test_a_split_is_read_by_one_pass_at_a_time() -> None:
    split = DatasetSplit(Noisy(), seed=0)
    running = split.batches([torch.tensor([1])] * 2, 0)
    next(running)
    with pytest.raises(RuntimeError, match="read already"):
        next(split.batches([torch.tensor([1])], 0))
    running.close()
    assert len(read(split, [[1]])) == 1


def indices_of(split: Any) -> list[int]:
    (inputs,) = read(split, [list(range(len(split)))])
    return [int(row[0]) for row in inputs]


def test_missing_parts_are_held_out_of_train_the_same_way_in_every_run() -> None:
    first, other = (dataset(Noisy(20), hold_out=0.2, seed=s) for s in (0, 1))
    parts = [indices_of(s) for s in (first.train, first.validation, first.test)]
    assert [len(p) for p in parts] == [12, 4, 4]
    assert sorted(index for part in parts for index in part) == list(range(20))
    assert [indices_of(s) for s in (other.train, other.validation, other.test)] == parts


def test_given_parts_are_used_as_they_are() -> None:
    splits = dataset(Noisy(20), validation=Noisy(5), test=Noisy(6))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [20, 5, 6]
    splits = dataset(Noisy(20), test=Noisy(6), hold_out=0.25)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [15, 5, 6]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": Stream()}, "data.train: Stream is not a map-style data set"),
        ({"train": None}, "data.train: NoneType is not a map-style data set"),
        ({"train": Noisy(), "test": 3}, "data.test: int is not a map-style data set"),
        ({"train": Noisy(), "hold_out": 0.5}, "data.hold_out=0.5: 2 times 10 of 20"),
        ({"train": Noisy(), "hold_out": 0.0}, "data.hold_out=0.0: 2 times 0 of 20"),
        ({"train": Noisy(), "loader_workers": -1}, "data.loader_workers=-1"),
    ],
)
def test_refuses_what_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(seed=0, **settings)


def test_hydra_builds_nested_data_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "users_own_data.py").write_text(
        "import torch\n"
        "class Ones(torch.utils.data.Dataset):\n"
        "    def __init__(self, n): self.n = n\n"
        "    def __len__(self): return self.n\n"
        "    def __getitem__(self, i): return torch.ones(2), 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"_target_": "users_own_data.Ones", "n": 30}
    splits = instantiate({"_target_": "trainer.data.dataset", "train": own}, seed=0)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [24, 3, 3]
