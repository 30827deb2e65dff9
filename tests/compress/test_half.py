"""Values stored as fp16, and that the rounded model equals the one decoded from its file."""

import pytest
import torch
from torch import Tensor, nn

from trainer.compress.half import round_to_half, shared_values, to_half
from trainer.compress.quantize import WeightQuantizer, attach

WIDE = {
    "too large": [1e6, 1.0],
    "infinite": [torch.inf, 1.0],
    "no number": [torch.nan, 1.0],
    "would be zero": [1e-9, -1e-9],
    "one would be zero": [1.0, 2e-8],
    "too coarse there": [1e-7, 2.3e-7],
    "too coarse for the largest": [2e-5 / 3],
}
NARROW = {
    "usual": [1 / 3, -2e-3, 0.0, -0.0],
    "small beside large": [1.0, 1e-6],
    "largest": [65504.0],
    "nothing": [],
    "zeros": [0.0, 0.0],
}


@pytest.mark.parametrize("name", WIDE)
def test_fp16_is_not_taken_where_it_loses_numbers(name: str) -> None:
    values = torch.tensor(WIDE[name])
    assert to_half(values) is values


@pytest.mark.parametrize("name", NARROW)
def test_fp16_is_taken_where_it_loses_the_last_bits(name: str) -> None:
    values = torch.tensor(NARROW[name])
    made = to_half(values)
    assert made.dtype == torch.float16
    assert torch.equal(made, values.half())


def sparse(values: Tensor) -> Tensor:
    """Each value four times among as many zeros."""
    mixed = torch.cat((values.repeat(4), torch.zeros(4 * len(values))))
    return mixed[torch.randperm(len(mixed))].view(len(values), 8)


def test_what_counts_as_shared() -> None:
    torch.manual_seed(0)
    weight = sparse(torch.randn(5))
    values = shared_values(weight)
    assert values is not None
    assert torch.equal(values, weight.unique()[weight.unique() != 0])
    assert shared_values(weight.double()) is None
    assert shared_values(torch.randn(9, 9)) is None
    assert shared_values(torch.empty(0, 3)) is None
    assert shared_values(weight.masked_fill(weight == 0, -0.0)) is None


def test_vectors_and_codebooks_are_rounded_and_all_else_is_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(8, 6), nn.Linear(5, 5))
    attach(model[0], "weight", WeightQuantizer(8, 4))
    model[0].weight_quantizer.scale.copy_(torch.rand(4))
    model[2].weight = nn.Parameter(sparse(torch.randn(6)))
    model.temperature = nn.Parameter(torch.tensor(1 / 3))
    model.wide = nn.Parameter(torch.rand(3).double())
    nn.init.normal_(model[1].running_mean)
    model[1].running_var.fill_(1e6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_to_half(model)
    rounded = set()
    for name, tensor in model.state_dict().items():
        if torch.equal(tensor, before[name]):
            continue
        assert torch.equal(tensor, before[name].half().float()), name
        rounded.add(name)
    vectors = {"0.bias", "1.running_mean", "2.bias", "3.bias", "temperature"}
    assert rounded == {*vectors, "2.weight"}
