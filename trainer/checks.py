"""Checks of a whole configuration that need torch and the user's classes, before anything starts.

What single values and their types must be is checked by trainer.config; here every `_target_` is
imported, its arguments are held against its signature, and combinations are judged.
"""

from collections.abc import Mapping

import torch
from torch import nn

from trainer import artifact
from trainer.compress.state import model_state
from trainer.config import Config, LimitsConfig
from trainer.config.instantiate import check_arguments, locate
from trainer.engine.optim import parse_optimizer
from trainer.errors import ConfigError
from trainer.parts import build_model, data_settings
from trainer.phases import Phase, Prune, build_phases
from trainer.phases.stages import check_teachers, stages
from trainer.store.serialization import check_state
from trainer.worker.run import check_phases


def check(cfg: Config) -> nn.Module | None:
    """Raise ConfigError for the first thing that is wrong with `cfg`.

    Returns:
        The model on the meta device; None where it cannot be built so, but perhaps for real.
    """
    phases = build_phases(cfg.phases)
    check_teachers(phases, cfg.init_from is not None)
    check_limits(cfg)
    _check_drops(phases, cfg.limits)
    parse_optimizer(cfg.optimizer)
    data = data_settings(cfg)
    check_arguments("data", locate("data", data, {}), data)
    check_arguments("model", locate("model", cfg.model, {}), cfg.model)
    model = _meta_model(cfg)
    if model is not None:
        check_state(model)
        check_phases(phases, model)
        if cfg.artifact.make:
            _check_writable(model)
    return model


def _check_writable(model: nn.Module) -> None:
    try:
        artifact.check(model_state(model))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"artifact.make=true: {error}; set artifact.make=false") from error


def _check_drops(phases: Mapping[str, Phase], limits: LimitsConfig) -> None:
    """Refuse a search (sparsity=auto) that may lose more than the result is allowed to."""
    limit = limits.max_accuracy_drop
    for name, phase in phases.items():
        drop = phase.max_drop if isinstance(phase, Prune) and phase.sparsity == "auto" else None
        if limit is not None and drop is not None and drop > limit:
            raise ConfigError(
                f"phases.{name}.max_drop={drop:g}: the search may lose more than "
                f"limits.max_accuracy_drop={limit:g} allows; lower it, a little below the limit"
            )


def _meta_model(cfg: Config) -> nn.Module | None:
    """The model without memory; None where it cannot be built so, but perhaps for real.

    The workers build it for real, and check the phases against it before they train.
    """
    try:
        with torch.device("meta"):
            return build_model(cfg)
    except ConfigError as error:
        instantiation = error.__cause__
        if instantiation is None or isinstance(instantiation.__cause__, ValueError):
            raise
        return None


def check_limits(cfg: Config) -> None:
    """Raise ConfigError for a limit that cannot be judged."""
    if (
        cfg.limits.max_accuracy_drop is not None
        and stages(build_phases(cfg.phases))[0].phase < 0
        and not cfg.init_from
    ):
        raise ConfigError(
            f"limits.max_accuracy_drop={cfg.limits.max_accuracy_drop:g}: there is no dense model "
            "to compare with; put a train phase first, or set init_from"
        )
