"""The counter-based generator: published values, and the same in numpy as in Python."""

import torch

from trainer.data.hashing import mix, mix_indices, splitmix64


def test_published_values() -> None:
    """The first outputs of splitmix64 from state 0 and 1234567 (Rosetta Code's reference list)."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317


def test_many_indices_at_once_equal_one_at_a_time() -> None:
    indices = torch.tensor([0, 1, 2, 59_999, 2**40, 2**62])
    for seed, epoch in [(0, 0), (1, 7), (2**63, 3), (2**64 - 1, 10**6)]:
        expected = [mix(seed, epoch, i) for i in indices.tolist()]
        assert mix_indices(mix(seed, epoch), indices).tolist() == expected


def test_every_word_matters() -> None:
    words = [(0, 0), (0, 1), (1, 0), (1, 1), (0, -1), (0, 0, 0)]
    assert len({mix(*w) for w in words}) == len(words)
