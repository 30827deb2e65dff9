"""Validates an experiment against its model."""

import torch
from torch import nn

from trainer import artifact
from trainer.compress.state import model_state
from trainer.engine.freeze import check_freeze
from trainer.engine.groups import check_groups
from trainer.engine.recompute import check_recompute
from trainer.errors import ConfigError
from trainer.experiment.experiment import Experiment
from trainer.store.serialization import check_state


def check_model(experiment: Experiment) -> nn.Module | None:
    """Validate phases and artifact against the model.

    Returns:
        The model on the meta device; None if it cannot be built there. The workers, which build
        the real model, then validate the phases before they train.

    Raises:
        ConfigError: The model cannot be built, or a setting of a phase does not fit it.
    """
    if experiment.config.artifact.make and not isinstance(experiment.coder, str):
        try:
            artifact.try_coder(experiment.coder)
        except ValueError as error:
            raise ConfigError(f"artifact.coder: {error}") from error
    try:
        with torch.device("meta"):
            model = experiment.build_model()
    except ConfigError as error:
        if error.__cause__ is None or isinstance(error.__cause__, ValueError):
            raise
        return None
    check_state(model)
    check_phases(experiment, model)
    if experiment.config.artifact.make:
        try:
            artifact.check(model_state(model))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"artifact.make=true: {error}; set artifact.make=false") from error
    return model


def check_phases(experiment: Experiment, model: nn.Module) -> None:
    """Raise ConfigError for a setting of a phase or the optimizer that does not fit `model`."""
    check_groups(model, experiment.optimizer.groups)
    check_recompute(model, experiment.config.recompute)
    for name, phase in experiment.phases.items():
        try:
            phase.check_model(model)
            check_freeze(model, phase.fit)
        except ConfigError as error:
            raise ConfigError(f"phases.{name}: {error}") from error
