"""What is found out about a whole configuration before anything starts."""

import pytest
import torch
from torch import nn

from trainer.checks import check
from trainer.config import Config, to_dataclass
from trainer.errors import ConfigError


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        self.fc = nn.Linear(3, 3)


def settings(make: bool) -> Config:
    plain = {
        "name": "test",
        "model": {"_target_": f"{__name__}.Complex"},
        "data": {"_target_": "trainer.data.mnist.mnist", "batch_size": 64},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "phases": {"train": {"_target_": "trainer.phases.Train", "fit": {"epochs": 1}}},
        "artifact": {"make": make},
    }
    return to_dataclass(Config, plain)


def test_a_model_that_no_file_can_hold_is_refused_before_it_is_trained() -> None:
    said = "artifact.make=true: phase: a torch.complex64 tensor .*; set artifact.make=false"
    with pytest.raises(ConfigError, match=said):
        check(settings(make=True))
    assert check(settings(make=False)) is not None
