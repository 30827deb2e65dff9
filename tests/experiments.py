"""Small experiments for tests."""

from typing import Any

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
