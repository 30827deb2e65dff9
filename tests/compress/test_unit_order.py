"""Sorted units: the same function, the fullest rows first, and fewer bytes."""

import torch
from torch import nn

from trainer import artifact
from trainer.compress.slicing import find_units
from trainer.compress.unit_order import sort_units
from trainer.models import LeNet5
from trainer.testing import ExampleNet


def test_the_model_computes_the_same_and_its_fullest_units_come_first() -> None:
    torch.manual_seed(0)
    model = ExampleNet().eval()
    images = torch.randn(5, 2, 6, 6)
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
        for weight in (model.conv.weight, model.fc1.weight):
            weight *= torch.rand(len(weight)).view(-1, *[1] * (weight.ndim - 1)) > torch.rand_like(
                weight
            )
        before = model(images)
        sort_units(model, find_units(model, images)[1])
        assert torch.allclose(model(images), before, atol=1e-5)
    rows = [int(row.count_nonzero()) for row in model.fc1.weight]
    assert rows == sorted(rows, reverse=True)
    assert int(model.conv.weight[0].count_nonzero()) >= int(model.conv.weight[-1].count_nonzero())


def test_the_file_is_smaller() -> None:
    torch.manual_seed(0)
    model = LeNet5()
    units = find_units(model, torch.randn(2, 1, 28, 28))[1]
    with torch.no_grad():
        for parameter in model.parameters():
            full = torch.rand(len(parameter)).view(-1, *[1] * (parameter.ndim - 1)) ** 6
            parameter.copy_((torch.rand_like(parameter) < 0.1 * full) * 0.25)
    before = len(artifact.encode(model.state_dict(), max_seconds=0.3))
    sort_units(model, units)
    assert len(artifact.encode(model.state_dict(), max_seconds=0.3)) < 0.99 * before


def test_layers_that_are_added_are_sorted_together() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 8)
            self.last = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            output: torch.Tensor = self.last(hidden + self.second(hidden).relu())
            return output

    torch.manual_seed(0)
    model, inputs = Residual(), torch.randn(4, 3)
    with torch.no_grad():
        model.second.weight[:5] = 0
        before = model(inputs)
        sort_units(model, find_units(model, inputs)[1])
        assert torch.allclose(model(inputs), before, atol=1e-6)
    assert not bool(model.second.weight[-1].any())
