"""Counts of parameters inside and outside a phase."""

import torch
from torch import nn

from trainer.compress.counts import Counts, counts
from trainer.compress.install import fold, install
from trainer.compress.parametrize import Packed


def test_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight  # tied: counted once
    model[1].weight.requires_grad_(False)
    nn.init.constant_(model[0].bias, 1.0)
    nn.init.constant_(model[2].bias, 1.0)
    mask = torch.arange(16).view(4, 4) < 6
    with torch.no_grad():
        model[0].weight.copy_(torch.where(mask, 1.0, 0.0))
    # weight 16, biases 8, batch norm 8, of whose bias the 4 values are zero
    expected = Counts(parameters=32, learnable=28, nonzero=6 + 8 + 4, sparsity=10 / 16)
    assert counts(model) == expected
    install(model, {"0.weight": Packed(model[0].weight, mask)})
    assert counts(model) == Counts(32, 28 - 10, expected.nonzero, expected.sparsity)
    fold(model)
    assert counts(model) == expected


def test_counts_without_weights() -> None:
    assert counts(nn.BatchNorm1d(3)) == Counts(6, 6, 3, 0.0)
