"""Tensors of different shapes are gathered from all ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.engine.gather import all_gather
from trainer.engine.world import World


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32, torch.bool])
def test_every_rank_gets_all_tensors(ranks: Callable[..., list[Any]], dtype: torch.dtype) -> None:
    tensors = [
        torch.arange(6).view(2, 3).to(dtype),
        torch.zeros(0),  # another type: this rank had no sample that would tell
        torch.tensor(1).to(dtype),
    ]
    for found in ranks(3, lambda world: all_gather(world, tensors[world.rank])):
        assert [[*tensor.shape] for tensor in found] == [[2, 3], [0], []]
        assert all(tensor.dtype == dtype for tensor in found)
        assert torch.equal(found[0], tensors[0])
        assert torch.equal(found[2], tensors[2])


def test_alone_nothing_is_copied() -> None:
    tensor = torch.zeros(2)
    assert all_gather(World.single(torch.device("cpu")), tensor)[0] is tensor
