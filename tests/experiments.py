"""Small experiments for tests."""

import contextlib
import io
from typing import Any

import yaml

from trainer.__main__ import main
from trainer.experiment import Experiment

SETTINGS: dict[str, Any] = {
    "name": "test",
    "model": {"_target_": "trainer.models.LeNet300"},
    "data": {"_target_": "trainer.data.mnist", "batch_size": 16},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    "phases": {"train": {"_target_": "trainer.phases.Train", "fit": {"epochs": 1}}},
    "cluster": {"workers": 1, "backend": "inline", "threads": 1},
}


def experiment(**changes: Any) -> Experiment:
    """An experiment with other values for some sections of `SETTINGS`."""
    return Experiment.from_config({**SETTINGS, **changes})


def printed(*arguments: str) -> dict[str, Any]:
    """The configuration that the command prints for these arguments."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*arguments, "--cfg"]) == 0
    settings: dict[str, Any] = yaml.safe_load(out.getvalue())
    return settings
