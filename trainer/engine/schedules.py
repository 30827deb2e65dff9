"""Learning-rate schedules as pure functions of the step."""

import math

from trainer.config import FitConfig


def lr_factor(step: int, total: int, steps_per_epoch: int, fit: FitConfig) -> float:
    """The factor on the peak learning rate at one step.

    The warm-up rises linearly and reaches 1 at its last step; then the schedule follows. `cosine`
    falls to 0 at `total` (Loshchilov & Hutter, SGDR, ICLR 2017, arXiv:1608.03983, without
    restarts), `step` multiplies by `fit.step_gamma` every `fit.step_epochs` epochs counted from the
    first step, `constant` stays at 1.

    Args:
        step: number of updates before this one; 0 is the first.
        total: number of steps of the phase.
        steps_per_epoch: number of steps of one epoch.
        fit: names the schedule and its settings.
    """
    warmup = round(fit.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if fit.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if fit.schedule == "step":
        return float(fit.step_gamma ** (step // (fit.step_epochs * steps_per_epoch)))
    return 1.0
