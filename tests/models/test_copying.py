"""Copies of models that keep what they have computed."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from trainer.compress.rewrite import skeleton
from trainer.models.copying import copy_model


class Keeps(nn.Module):
    """It stores what its layer returned, also in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last: Tensor = self.fc(x)
        self.seen = [self.last, self.last * 2]
        return self.last


def old_norms() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(
            nn.utils.weight_norm(nn.Linear(3, 4)), nn.utils.spectral_norm(nn.Linear(4, 3))
        )


@pytest.mark.parametrize("build", [Keeps, old_norms])
def test_a_copy_computes_the_same_and_shares_nothing(build: type[nn.Module]) -> None:
    model, x = build().eval(), torch.randn(2, 3)
    expected = model(x)
    copied = copy_model(model)
    assert torch.equal(copied(x), expected)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert torch.equal(model(x), expected)


def test_a_kept_tensor_is_the_same_wherever_it_is_kept() -> None:
    model = Keeps()
    model(torch.randn(2, 3))
    copied = copy_model(model)
    assert isinstance(copied, Keeps)
    assert copied.seen[0] is copied.last
    assert copied.last is not model.last
    assert torch.equal(copied.seen[1], model.seen[1])
    assert model.last.grad_fn is not None  # the model stays as it is


def test_a_skeleton_of_such_a_model_has_no_values() -> None:
    assert all(p.is_meta for p in skeleton(old_norms()).parameters())
