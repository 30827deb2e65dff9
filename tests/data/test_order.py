"""The global order of samples does not depend on the number of workers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import global_batches, permutation, shard

sizes = st.integers(1, 300)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 1000)


@given(n=sizes, batch_size=st.integers(1, 80), seed=seeds, epoch=epochs)
@settings(deadline=None)
def test_every_sample_exactly_once_per_epoch(
    n: int, batch_size: int, seed: int, epoch: int
) -> None:
    batches = global_batches(n, batch_size, seed, epoch)
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size


@given(n=sizes, batch_size=st.integers(1, 80), seed=seeds, world_size=st.integers(1, 9))
@settings(deadline=None)
def test_workers_together_see_the_global_batches(
    n: int, batch_size: int, seed: int, world_size: int
) -> None:
    for batch in global_batches(n, batch_size, seed, epoch=0):
        parts = [shard(batch, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), batch)
        lengths = [len(p) for p in parts]
        assert max(lengths) - min(lengths) <= 1


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = permutation(1000, seed=3, epoch=5)
    torch.rand(10)
    assert torch.equal(permutation(1000, seed=3, epoch=5), first)
    assert not torch.equal(permutation(1000, seed=3, epoch=6), first)
    assert not torch.equal(permutation(1000, seed=4, epoch=5), first)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    permutation(100, seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("n", "batch_size", "message"),
    [(0, 4, "no training samples"), (5, 0, "data.batch_size=0: it must be at least 1")],
)
def test_refuses_what_gives_no_batches(n: int, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        global_batches(n, batch_size, seed=0, epoch=0)
