"""Contract suite of splits: requirements of the training loop."""

from collections.abc import Callable

import pytest
import torch

from trainer.data.datasets import DatasetSplit
from trainer.data.idx import normalise
from trainer.data.sources import as_splits
from trainer.data.split import Split, TensorSplit


class Pairs(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Sample i is [i, i + 1] with target i % 3."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index), index + 1.0]), index % 3


def in_memory() -> Split:
    inputs = torch.arange(10.0)[:, None] + torch.tensor([0.0, 1.0])
    return TensorSplit(inputs, torch.arange(10) % 3)


SPLITS: dict[str, Callable[[], Split]] = {
    "tensor": in_memory,
    "dataset": lambda: DatasetSplit(Pairs(), seed=0),
}


@pytest.fixture(params=SPLITS)
def split(request: pytest.FixtureRequest) -> Split:
    return SPLITS[request.param]()


@pytest.mark.parametrize("epoch", [None, 0, 3])
def test_batches_come_in_the_order_asked_for(split: Split, epoch: int | None) -> None:
    order = [torch.tensor([7, 0, 7]), torch.tensor([9])]
    batches = list(split.batches(order, epoch))
    assert len(batches) == len(order)
    for (inputs, targets), indices in zip(batches, order, strict=True):
        assert torch.equal(inputs, indices[:, None] + torch.tensor([0.0, 1.0]))
        assert targets.dtype == torch.int64
        assert torch.equal(targets, indices % 3)


def test_an_empty_shard_is_an_empty_batch(split: Split) -> None:
    ((inputs, targets),) = split.batches([torch.tensor([], dtype=torch.int64)], epoch=0)
    assert inputs.shape == (0, 2)
    assert targets.shape == (0,)
    assert targets.dtype == torch.int64


def test_no_batches_asked_for_none_given(split: Split) -> None:
    assert list(split.batches([], None)) == []


def test_the_order_may_be_a_generator_and_a_pass_may_end_early(split: Split) -> None:
    assert len(split) == 10
    first = split.batches((torch.tensor([i]) for i in range(10)), 0)
    assert next(iter(first))[0].tolist() == [[0.0, 1.0]]
    del first
    again = split.batches((torch.tensor([i]) for i in (5, 6)), 0)
    assert [inputs[0, 0].item() for inputs, _ in again] == [5.0, 6.0]


def test_a_pass_does_not_touch_the_global_generator(split: Split) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(split.batches([torch.tensor([1, 2])], 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_tensor_split_augments_training_batches_and_prepares_all() -> None:
    seen: list[tuple[list[int], int]] = []

    def augment(inputs: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
        seen.append((indices.tolist(), epoch))
        return inputs + 1

    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(4), augment, normalise)
    ((trained, _),) = split.batches([torch.tensor([3, 1])], 5)
    ((evaluated, _),) = split.batches([torch.tensor([3, 1])], None)
    assert seen == [([3, 1], 5)]
    assert torch.equal(trained, normalise(images[:2] + 1))
    assert torch.equal(evaluated, normalise(images[:2]))
    assert not images.any()


def test_tensor_split_wants_a_target_for_each_input() -> None:
    with pytest.raises(ValueError, match="3 inputs with 2 targets"):
        TensorSplit(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="30 inputs with 20 targets"):
        as_splits((torch.zeros(30, 1), torch.zeros(20, dtype=torch.int64)))
