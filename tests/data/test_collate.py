"""Samples of different lengths."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from trainer.data.checked import CheckedSplit
from trainer.data.collate import Pad
from trainer.data.datasets import dataset
from trainer.data.split import TensorSplit
from trainer.data.tree import first_samples, map_tensors
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
            lambda samples: (torch.zeros(2), [{"boxes": torch.zeros(4)}] * 2),
            r"the targets of collate must be a tensor \[n, ...\], not list; what the loss needs",
        ),
    ],
)
def test_a_wrong_function_is_named(collate, said):
    split = CheckedSplit(dataset(SAMPLES, SAMPLES, SAMPLES, collate=collate).train, "train", None)
    with pytest.raises(RunError, match=said):
        next(split.batches([torch.arange(2)], 0))


def _graphs(samples):
    """Nodes and edges of all graphs in one list each, and targets of the graphs."""
    nodes = torch.cat([x for x, _ in samples])
    edges = torch.arange(2 * len(nodes) + 3).reshape(1, -1)
    return {"nodes": nodes, "edges": edges}, torch.tensor([len(target) for _, target in samples])


def test_batches_need_not_have_a_row_for_each_sample():
    split = dataset(SAMPLES, SAMPLES, SAMPLES, collate=_graphs).train
    ((inputs, targets),) = split.batches([torch.tensor([0, 2])], 0)
    assert inputs["nodes"].tolist() == [1, 1, 2, 3]
    assert inputs["edges"].shape == (1, 11)
    assert targets.tolist() == [1, 3]
    assert first_samples(inputs, 1) is inputs
    with_limit = {"x": torch.zeros(3), "limit": torch.tensor(0.5)}
    assert first_samples(with_limit, 1) is with_limit
    assert first_samples((torch.zeros(3), torch.zeros(3, 2)), 1)[1].shape == (1, 2)
    number, packed = torch.tensor(0.5), pack_sequence([torch.zeros(1)])
    assert first_samples(number, 1) is number
    assert first_samples(packed, 1) is packed


def test_an_empty_batch_with_a_number_among_its_inputs_has_the_inputs_of_a_sample():
    def collate(samples):
        inputs = {"x": torch.cat([x for x, _ in samples]), "limit": torch.tensor(0.5)}
        return inputs, torch.tensor([len(target) for _, target in samples])

    split = dataset(SAMPLES, SAMPLES, SAMPLES, collate=collate).train
    ((inputs, targets),) = split.batches([torch.tensor([], dtype=torch.int64)], 0)
    assert inputs["x"].tolist() == [1]
    assert targets.shape == (0,)


def test_a_wrong_target_that_belongs_to_no_row_is_named_by_its_batch():
    def nodes(samples):
        return _graphs(samples)[0], torch.cat([target for _, target in samples])

    def check(targets):
        return 3, "it is wrong"

    split = CheckedSplit(dataset(SAMPLES, SAMPLES, SAMPLES, collate=nodes).train, "train", check)
    with pytest.raises(RunError, match=r"train sample 2: in a batch of 2, it is wrong"):
        next(split.batches([torch.tensor([2, 0])], 0))


def test_packed_sequences_move_without_their_batch_sizes():
    packed = pack_sequence([torch.zeros(1), torch.ones(2)], enforce_sorted=False)
    moved = map_tensors(lambda tensor: tensor.to("meta"), packed)
    assert moved.data.is_meta
    assert not moved.batch_sizes.is_meta
    assert moved.sorted_indices.is_meta


def test_a_dictionary_as_target_belongs_into_the_input():
    samples = [(torch.zeros(1), {"boxes": torch.zeros(1, 4)})] * 20
    split = CheckedSplit(dataset(samples, samples, samples).train, "train", None)
    with pytest.raises(RunError, match=r"not dict; .* can be a part of the input"):
        next(split.batches([torch.arange(2)], 0))


def test_sparse_samples_need_a_function_that_makes_batches():
    samples = [(torch.eye(3)[n % 3].to_sparse(), 1) for n in range(20)]
    split = CheckedSplit(dataset(samples, samples, samples).train, "train", None)
    with pytest.raises(RunError, match=r"its inputs are a sparse tensor; give to_dense\(\)"):
        next(split.batches([torch.arange(2)], 0))
    with pytest.raises(ValueError, match=r"the inputs are a sparse tensor, .*to_dense\(\)"):
        TensorSplit(torch.eye(3).to_sparse(), torch.zeros(3))

    def stacked(samples):
        return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])

    split = dataset(samples, samples, samples, collate=stacked).train
    assert next(split.batches([torch.arange(2)], 0))[0].is_sparse


def test_complex_samples_are_stacked():
    samples = [(torch.tensor([1j * n]), 1) for n in range(20)]
    ((inputs, _),) = dataset(samples, samples, samples).train.batches([torch.arange(2)], 0)
    assert inputs.tolist() == [[0j], [1j]]
