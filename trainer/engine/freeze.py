"""Layers that are frozen for the first epochs of a phase, or for all of it.

A frozen parameter requires no gradient: it costs no backward pass, no all-reduce and no optimizer
state, and weight decay leaves it alone. A batch norm whose parameters are frozen is in evaluation
mode, so that it keeps its running statistics as well.
"""

from collections.abc import Mapping
from math import inf

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.compress.select import matches, no_match, trainable_parameters
from trainer.config import FitConfig
from trainer.errors import ConfigError


class Freezing:
    """Freezes parameters and unfreezes them when their epoch begins.

    Attributes:
        trained: The parameters that are trained in at least one epoch.

    Args:
        model: As the optimizer will see it; its parameters may be those of compressed weights.
        freeze: `FitConfig.freeze`. A pattern that matches nothing is ignored here.
        epochs: Of the phase.
    """

    def __init__(self, model: nn.Module, freeze: Mapping[str, int | None], epochs: int) -> None:
        self._model = model
        until = _frozen_until(model, freeze)
        self._until = [
            (p, until[name]) for name, p in trainable_parameters(model).items() if name in until
        ]
        whole = {id(p) for p, end in self._until if end >= epochs}
        self.trained = [p for p in model.parameters() if p.requires_grad and id(p) not in whole]

    def begin_epoch(self, epoch: int) -> bool:
        """Freeze what is frozen in this epoch, and unfreeze the rest.

        Args:
            epoch: Of the phase; 0 is the first.

        Returns:
            Whether other parameters require a gradient than before.
        """
        changed = False
        for parameter, end in self._until:
            wanted = epoch >= end
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
                parameter.grad = None
                changed = True
        if self._until:
            _set_norm_modes(self._model)
        return changed

    def release(self) -> None:
        """Unfreeze everything."""
        for parameter, _ in self._until:
            parameter.requires_grad_(True)


def frozen_values(model: nn.Module, fit: FitConfig) -> int:
    """Number of values that are frozen for the whole phase."""
    until = _frozen_until(model, fit.freeze)
    named = trainable_parameters(model)
    return sum(named[name].numel() for name, end in until.items() if end >= fit.epochs)


def check_freeze(model: nn.Module, fit: FitConfig) -> None:
    """Raise ConfigError for a pattern that matches nothing, and if nothing is left to train.

    Args:
        model: With its initial weights; it may be on the meta device.
        fit: Settings of the phase.
    """
    names = list(trainable_parameters(model))
    for pattern in fit.freeze:
        if not any(matches(pattern, name) for name in names):
            raise ConfigError(f"fit.freeze: {no_match(pattern, names, 'trainable parameter')}")
    if fit.epochs and fit.freeze and len(_frozen_until(model, fit.freeze)) == len(names):
        raise ConfigError(
            f"fit.freeze={dict(fit.freeze)}: it freezes every parameter in the first epoch; leave "
            "at least one to train, such as those of the head"
        )


def _frozen_until(model: nn.Module, freeze: Mapping[str, int | None]) -> dict[str, float]:
    """The epoch in which each frozen parameter is unfrozen, by logical name; infinity: never."""
    until: dict[str, float] = {}
    for name in trainable_parameters(model) if freeze else ():
        for pattern, end in freeze.items():
            if matches(pattern, name):  # of several patterns the last one decides
                until[name] = inf if end is None else end
    return {name: end for name, end in until.items() if end > 0}


def _set_norm_modes(model: nn.Module) -> None:
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _NormBase) and own:
            module.train(model.training and any(p.requires_grad for p in own))
