"""Targets without an output are refused as they are read, by split and sample."""

import time

import pytest
import torch
from torch.utils.data import Dataset, Subset

from trainer.data.checked import CheckedSplit, TargetCheck, sample_name
from trainer.data.datasets import DatasetSplit
from trainer.data.sources import as_splits
from trainer.data.split import TensorSplit
from trainer.engine.profile import Profile, ProfiledSplit
from trainer.errors import RunError, described
from trainer.tasks import Classification

INPUTS = torch.arange(6.0)[:, None]


def check(classes: int) -> TargetCheck:
    return lambda targets: Classification().check_values(targets, (1, classes))


def checked(targets: torch.Tensor, classes: int = 4) -> CheckedSplit:
    return CheckedSplit(TensorSplit(INPUTS, targets), "train", check(classes))


def test_right_samples_pass_unchanged() -> None:
    targets = torch.tensor([0, 1, 2, 3, -100, 0])
    order = [torch.tensor([5, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([4, 3])]
    split = checked(targets)
    assert len(split) == 6
    for (inputs, found), indices in zip(split.batches(iter(order), 0), order, strict=True):
        assert torch.equal(inputs, INPUTS[indices])
        assert torch.equal(found, targets[indices])


@pytest.mark.parametrize("label", [4, -1, -101])
def test_a_target_without_an_output_is_named(label: int) -> None:
    split = checked(torch.tensor([0, 1, 2, label, 0, 0]))
    batches = split.batches([torch.tensor([0, 1]), torch.tensor([2, 3, 5])], 0)
    next(batches)
    with pytest.raises(RunError, match=rf"data: train sample 3: its target is {label}, .* 0 to 3"):
        next(batches)


def test_a_target_of_a_sequence_is_named_by_its_sample() -> None:
    split = checked(torch.tensor([[0, 1], [-100, 2], [3, 3], [-100, 9], [0, 7], [0, 0]]))
    with pytest.raises(RunError, match="train sample 4: its target is 7,"):
        list(split.batches([torch.tensor([1, 4, 3])], 0))


def test_samples_that_were_held_out_have_their_number_in_the_whole_data() -> None:
    train = as_splits((INPUTS, torch.arange(6)), hold_out=0.2).train
    (((value,), _),) = train.batches([torch.tensor([2])], None)
    expected = f"sample 2 (number {value.item():.0f} of the data set that it was held out of)"
    assert sample_name(train, 2) == expected


def test_an_error_of_the_data_set_names_split_and_sample() -> None:
    part = DatasetSplit(Subset([(torch.zeros(2), 0)], [0, 7]), seed=0)  # type: ignore[arg-type]
    with pytest.raises(IndexError) as raised:
        list(CheckedSplit(part, "train", check(4)).batches([torch.tensor([1])], None))
    assert described(raised.value) == (
        "IndexError: list index out of range (while sample 1 (number 7 of the data set that it was "
        "held out of) was read; in the train data)"
    )


@pytest.mark.parametrize("kind", [ConnectionResetError, TimeoutError])
def test_a_lost_connection_of_the_data_is_not_that_of_a_rank(kind: type[OSError]) -> None:
    class Remote(Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            raise kind("the storage does not answer")

    split = CheckedSplit(DatasetSplit(Remote(), seed=0), "train", check(4))
    with pytest.raises(OSError, match="does not answer") as raised:
        list(split.batches([torch.tensor([1])], None))
    assert not isinstance(raised.value, ConnectionError | TimeoutError)
    assert described(raised.value) == (
        f"OSError: {kind.__name__}: the storage does not answer (while sample 1 was read; in the "
        "train data)"
    )


def test_an_unusable_sample_ends_the_run_with_its_name() -> None:
    items = [(torch.zeros(2), 0), (torch.zeros(2), 0.5), (torch.zeros(2), 0)]
    part = DatasetSplit(Subset(items, [2, 1]), seed=0)  # type: ignore[arg-type]
    split = CheckedSplit(part, "test", check(4))
    with pytest.raises(RunError, match=r"test sample 1 \(number 1 of .* its target must be an int"):
        list(split.batches([torch.tensor([0, 1])], None))
    assert sample_name(split, 0) == sample_name(part, 0)
    profiled = ProfiledSplit(split, Profile(torch.device("cpu")))
    assert sample_name(profiled, 0) == sample_name(part, 0)
    assert len(list(split.batches([torch.tensor([0])], None))) == 1  # the pass before has ended


def test_the_time_that_the_caller_waits_is_counted():
    class Slow(TensorSplit):
        def batches(self, order, epoch):
            for batch in super().batches(order, epoch):
                time.sleep(0.01)
                yield batch

    split = CheckedSplit(
        Slow(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)), "train", check(2)
    )
    for _ in split.batches(torch.arange(4).split(2), None):
        pass
    assert split.waited_s >= 0.02
