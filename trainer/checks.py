"""Checks of a whole configuration that need torch and the user's classes, before anything starts.

What single values and their types must be is checked by trainer.config; here every `_target_` is
imported, its arguments are held against its signature, and combinations are judged.
"""

import torch
from torch import nn

from trainer.build import check_arguments, target
from trainer.config import Config
from trainer.engine.optim import build_optimizer
from trainer.errors import ConfigError
from trainer.phases import build_phases
from trainer.run import build_model


def check(cfg: Config) -> None:
    """Raise ConfigError for the first thing that is wrong with `cfg`."""
    phases = build_phases(cfg.phases)
    build_optimizer(cfg.optimizer, [nn.Parameter(torch.zeros(1))])
    data = {key: value for key, value in cfg.data.items() if key != "batch_size"}
    check_arguments("data", target("data", data), data)
    model = _meta_model(cfg)
    if model is not None:
        for phase in phases.values():
            phase.check(model)


def _meta_model(cfg: Config) -> nn.Module | None:
    """The model without memory; None where it can only be built with, which the workers will do."""
    try:
        with torch.device("meta"):
            return build_model(cfg)
    except ConfigError as error:
        refused = error.__cause__ and error.__cause__.__cause__
        if isinstance(refused, NotImplementedError | RuntimeError):
            return None
        raise
