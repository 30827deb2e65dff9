"""Learning-rate schedules: functions of the number of updates, so that they need no checkpoint."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from trainer.config import FitConfig
from trainer.config.instantiate import accepted_context, build_object, check_arguments, locate
from trainer.errors import ConfigError, first_line

Schedule = Callable[[int], float]
"""From the number of updates so far to the learning rate. The number never decreases."""

_RISE = 0.3  # one_cycle: fraction of the steps until the peak,
_START = 1 / 25  # factor at the first step,
_END = _START / 1e4  # and at the last one

_ASSUMED_STEPS = 20  # of a training whose length is not known yet


def build_schedule(fit: FitConfig, peak: float, total: int, steps_per_epoch: int) -> Schedule:
    """The schedule of one training.

    Args:
        fit: Names the schedule and its settings.
        peak: Learning rate at its highest; a scheduler of torch begins with it.
        total: Number of steps of the phase.
        steps_per_epoch: Number of steps of one epoch.

    Raises:
        ConfigError: A `_target_` cannot be imported, or does not accept its settings.
    """
    if isinstance(fit.schedule, str):
        return lambda step: peak * lr_factor(step, total, steps_per_epoch, fit)
    warmup = warmup_steps(fit, steps_per_epoch)
    later = _custom(fit.schedule, peak, max(1, total - warmup), steps_per_epoch)
    return lambda step: peak * (step + 1) / warmup if step < warmup else later(step - warmup)


def check_schedule(
    fit: FitConfig, peak: float, total: int | None = None, steps_per_epoch: int = _ASSUMED_STEPS
) -> None:
    """Raise ConfigError for a schedule that cannot be computed at the first or the last step.

    Args:
        fit: As for `build_schedule`.
        peak: Likewise.
        total: Likewise; None: not known yet, so that only the first steps are computed.
        steps_per_epoch: Likewise.
    """
    if isinstance(fit.schedule, str):
        return
    try:
        schedule = build_schedule(fit, peak, total or _ASSUMED_STEPS, steps_per_epoch)
        for step in (0, 1) if total is None else (0, total - 1):
            rate = schedule(step)
            if not isinstance(rate, float | int) or not math.isfinite(rate) or rate < 0:
                raise ConfigError(
                    f"fit.schedule: the learning rate after {step} steps is {rate}; it must be a "
                    "number of at least 0"
                )
    except ConfigError:
        raise
    except Exception as error:  # of the user's own code
        raise ConfigError(f"fit.schedule: {type(error).__name__}: {first_line(error)}") from error


def warmup_steps(fit: FitConfig, steps_per_epoch: int) -> int:
    """Number of steps of the linear warm-up."""
    return round(fit.warmup_epochs * steps_per_epoch)


def lr_factor(step: int, total: int, steps_per_epoch: int, fit: FitConfig) -> float:
    """The factor on the peak learning rate at one step.

    The warm-up rises linearly and reaches 1 at its last step; then the schedule follows. `cosine`
    falls to 0 at `total` (Loshchilov & Hutter, SGDR, ICLR 2017, arXiv:1608.03983, without
    restarts), `polynomial` likewise, as the power `fit.power` of the fraction of steps that remain;
    `step` multiplies by `fit.step_gamma` every `fit.step_epochs` epochs counted from the first
    step, `constant` stays at 1. `one_cycle` rises from 1/25 to 1 in 30% of the steps and falls to
    1/250000, both along a cosine (Smith & Topin, Super-Convergence, 2017, arXiv:1708.07120, as in
    torch.optim.lr_scheduler.OneCycleLR).

    Args:
        step: number of updates before this one; 0 is the first.
        total: number of steps of the phase.
        steps_per_epoch: number of steps of one epoch.
        fit: names a schedule of these, and its settings.
    """
    warmup = warmup_steps(fit, steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if fit.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if fit.schedule == "polynomial":
        return float((1 - (step - warmup) / max(1, total - warmup)) ** fit.power)
    if fit.schedule == "one_cycle":
        return _one_cycle(step, total)
    if fit.schedule == "step":
        return float(fit.step_gamma ** (step // (fit.step_epochs * steps_per_epoch)))
    return 1.0


def _one_cycle(step: int, total: int) -> float:
    top = max(1.0, _RISE * total - 1)
    if step <= top:
        return _along_cosine(_START, 1.0, step / top)
    return _along_cosine(1.0, _END, (step - top) / max(1.0, total - 1 - top))


def _along_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def _custom(chosen: Any, peak: float, total: int, steps_per_epoch: int) -> Schedule:
    """The schedule of a function from step to factor, or of a scheduler of torch."""
    key, context = "fit.schedule", {"total_steps": total, "steps_per_epoch": steps_per_epoch}
    function = locate(key, chosen, {}) if isinstance(chosen, Mapping) else chosen
    if isinstance(function, type):
        if not issubclass(function, LRScheduler) or not isinstance(chosen, Mapping):
            raise ConfigError(
                f"{key}={chosen}: it must be a function from the step to a factor on the learning "
                "rate, or the _target_ of a class of torch.optim.lr_scheduler"
            )
        return _Followed(lambda rates: _build_scheduler(chosen, rates, context), peak)
    settings = {}
    if isinstance(chosen, Mapping):
        check_arguments(key, function, chosen)
        settings = {name: value for name, value in chosen.items() if name != "_target_"}
    factor = functools.partial(
        function, **settings, **accepted_context(function, settings, context)
    )
    return lambda step: peak * factor(step)


def _build_scheduler(
    settings: Mapping[str, Any], rates: torch.optim.Optimizer, context: Mapping[str, Any]
) -> LRScheduler:
    try:
        return build_object(
            "fit.schedule", settings, LRScheduler, context={**context, "optimizer": rates}
        )
    except ConfigError as error:
        if "momentum" in str(error):
            raise ConfigError(
                f"{error}; only the learning rate follows a schedule: set cycle_momentum=false"
            ) from error
        raise


class _Rates(torch.optim.Optimizer):
    """An optimizer for a scheduler of torch to set the learning rate of."""

    def __init__(self, lr: float) -> None:
        super().__init__([nn.Parameter(torch.zeros(()))], {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing; a scheduler expects it to be called first."""


class _Followed:
    """The learning rate that a scheduler of torch sets. A `Schedule`.

    A resumed training replays the scheduler from the first step.
    """

    def __init__(self, build: Callable[[torch.optim.Optimizer], LRScheduler], lr: float) -> None:
        self._rates = _Rates(lr)
        self._scheduler = build(self._rates)
        self._rates.step()
        self._steps = 0

    def __call__(self, step: int) -> float:
        while self._steps < step:
            self._scheduler.step()
            self._steps += 1
        return float(self._rates.param_groups[0]["lr"])
