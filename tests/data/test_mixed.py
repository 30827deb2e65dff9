"""Mixed samples: the same for any number of workers."""

import pytest
import torch

from trainer.data.mixed import Mix, MixedSplit, draw_mix
from trainer.data.order import global_batches, shard
from trainer.data.split import TensorSplit

SAMPLES = TensorSplit(torch.arange(47.0)[:, None] * torch.ones(1, 3), torch.arange(47))


def mixed(order, epoch=2, batch_size=10):
    """(own, partner, mix) of each sample, in the given order."""
    split = MixedSplit(SAMPLES, 0.4, 0.0, 7, batch_size)
    found = []
    for batch, targets in split.batches(order, epoch):
        assert torch.equal(batch["inputs"][:, 0].long(), batch["targets"])
        assert len(batch["partners"]) == len(targets)
        partners = batch["targets"][batch["partners"]].tolist()
        found += [(*pair, batch["mix"]) for pair in zip(targets.tolist(), partners, strict=True)]
    return found


@pytest.mark.parametrize("batch_size", [10, 7])
def test_pairs_do_not_depend_on_how_batches_are_split(batch_size):
    batches = global_batches(47, batch_size, 7, 2)
    whole = mixed(batches, batch_size=batch_size)
    assert [own for own, *_ in whole] == torch.cat(batches).tolist()
    for size in (2, 3, 4):
        parts = [part for b in batches for rank in range(size) if len(part := shard(b, rank, size))]
        assert mixed(parts, batch_size=batch_size) == whole
    partner = {own: other for own, other, _ in whole}
    assert all(partner[partner[own]] == own for own in partner)
    alone = [own for own in partner if partner[own] == own]
    assert len(alone) == sum(len(b) % 2 for b in batches)
    assert len({mix for *_, mix in whole}) == len(batches)


def test_each_epoch_has_its_own_mixes_and_evaluation_none():
    order = global_batches(47, 10, 7, 3)
    assert mixed(order, epoch=3) != mixed(global_batches(47, 10, 7, 2))
    split = MixedSplit(SAMPLES, 0.4, 0.0, 7, 10)
    inputs, targets = next(split.batches(order, None))
    assert torch.equal(inputs[:, 0].long(), targets)
    assert len(split) == 47


def test_mixup_is_the_weighted_mean():
    own, partners = torch.ones(2, 3), torch.full((2, 3), 5.0)
    inputs, share = Mix(0.75, None).inputs(own, partners)
    assert torch.equal(inputs, torch.full((2, 3), 2.0))
    assert share == 0.75


def test_cutmix_replaces_a_box_and_counts_its_area():
    own, partners = torch.zeros(2, 1, 8, 12), torch.ones(2, 1, 8, 12)
    inputs, share = Mix(0.75, (0.5, 0.5)).inputs(own, partners)
    assert inputs.sum((1, 2, 3)).tolist() == [4 * 6] * 2
    assert inputs[0, 0, 2:6, 3:9].min() == 1
    assert share == 0.75
    inputs, share = Mix(0.75, (0.99, 0.0)).inputs(own, partners)  # cut off by the border
    assert inputs[0, 0].sum() == 3 * 3
    assert share == 1 - 9 / 96
    assert not own.any()


def test_draws():
    mixes = [draw_mix(0.4, 1.0, 0, 0, batch) for batch in range(400)]
    cut = [mix for mix in mixes if mix.center]
    assert 150 < len(cut) < 250
    assert all(0 <= mix.share <= 1 for mix in mixes)
    assert sum(mix.share for mix in mixes) / 400 == pytest.approx(0.5, abs=0.05)
    assert all(draw_mix(0.4, 0.0, 0, 0, batch).center is None for batch in range(9))
    assert all(draw_mix(0.0, 0.4, 0, 0, batch).center for batch in range(9))
