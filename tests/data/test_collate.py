"""Samples of different lengths."""

import pytest
import torch

from trainer.data.checked import CheckedSplit
from trainer.data.collate import Pad
from trainer.data.datasets import dataset
from trainer.errors import RunError

SAMPLES = [(torch.arange(1, 2 + n % 4), torch.arange(1, 2 + n % 4)) for n in range(20)]


def test_sequences_are_padded_to_the_longest_of_the_batch():
    splits = dataset(SAMPLES, SAMPLES, SAMPLES, collate=Pad(value=9))
    order = [torch.tensor([0, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([1])]
    (inputs, targets), (none, _), (short, _) = splits.train.batches(order, 0)
    assert inputs.tolist() == [[1, 9, 9], [1, 2, 3]]
    assert targets.tolist() == [[1, -100, -100], [1, 2, 3]]
    assert len(none) == 0
    assert short.tolist() == [[1, 2]]


def test_mappings_have_values_of_their_own():
    pad = Pad({"ids": 7})
    samples = [({"ids": torch.ones(n), "mask": torch.ones(n)}, n) for n in (1, 2)]
    inputs, targets = pad(samples)
    assert inputs["ids"].tolist() == [[1, 7], [1, 1]]
    assert inputs["mask"].tolist() == [[1, 0], [1, 1]]
    assert targets.tolist() == [1, 2]


def test_random_numbers_of_collate_are_seeded_by_the_batch():
    def noisy(samples):
        return torch.rand(len(samples)), torch.zeros(len(samples), dtype=torch.int64)

    def read(epoch):
        split = dataset(SAMPLES, SAMPLES, SAMPLES, collate=noisy).train
        return next(iter(split.batches([torch.arange(4)], epoch)))[0]

    assert torch.equal(read(0), read(0))
    assert not torch.equal(read(0), read(1))


@pytest.mark.parametrize(
    ("collate", "said"),
    [
        (lambda samples: torch.stack([x for x, _ in samples]), "collate raised RuntimeError"),
        (
            lambda samples: (torch.zeros(1), torch.zeros(1)),
            r"entry for each sample: 2, not \[1\]; pad",
        ),
    ],
)
def test_a_wrong_function_is_named(collate, said):
    split = CheckedSplit(dataset(SAMPLES, SAMPLES, SAMPLES, collate=collate).train, "train", None)
    with pytest.raises(RunError, match=said):
        next(split.batches([torch.arange(2)], 0))
