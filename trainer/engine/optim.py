"""Optimizers by name, and learning-rate schedules as pure functions of the step."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.config import FitConfig
from trainer.config.instantiate import check_arguments, locate
from trainer.errors import ConfigError

OWN_KERNELS = {"fused", "foreach", "differentiable"}  # settings that choose among kernels


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer class with its settings; `build` makes one for some parameters."""

    kind: type[torch.optim.Optimizer]
    options: Mapping[str, Any]  # keyword arguments of the class, `lr` included

    @property
    def lr(self) -> float:
        """The peak learning rate of phases that set none."""
        return float(self.options["lr"])

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer, with torch's fused kernel if there is one for the parameters.

        Args:
            parameters: All on one device.

        Raises:
            ConfigError: The class refuses a setting.
        """
        parameters = list(parameters)
        options = dict(self.options)
        if not OWN_KERNELS & options.keys() and _fused_works(self.kind, parameters):
            options["fused"] = True
        try:
            return self.kind(parameters, **options)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"optimizer: {self.kind.__name__} refuses its settings: {error}"
            ) from error


def parse_optimizer(
    settings: Mapping[str, Any], objects: Mapping[str, Any] | None = None
) -> OptimizerSpec:
    """The optimizer that settings describe.

    Args:
        settings: `_target_` (a subclass of torch.optim.Optimizer) and its keyword arguments.
        objects: Classes by dotted path that cannot be imported.

    Raises:
        ConfigError: The class is unknown or needs a closure, or it lacks or refuses an argument.
    """
    kind = locate("optimizer", settings, objects or {})
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(
            f"optimizer._target_={settings['_target_']}: it is not a torch.optim.Optimizer"
        )
    check_arguments("optimizer", kind, settings)
    options = {key: value for key, value in settings.items() if key != "_target_"}
    lr = options.get("lr")
    if not isinstance(lr, int | float) or not math.isfinite(lr) or lr <= 0:
        raise ConfigError(f"optimizer.lr={lr}: it must be a number above 0")
    if "closure" in _needed(kind.step):
        raise ConfigError(
            f"optimizer._target_={settings['_target_']}: it evaluates the loss several times "
            "a step (a closure), which data-parallel training does not offer"
        )
    spec = OptimizerSpec(kind, options)
    spec.build([nn.Parameter(torch.zeros(1))])
    return spec


def _needed(function: Callable[..., Any]) -> set[str]:
    """The arguments that a function cannot do without."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is inspect.Parameter.empty}


def _fused_works(kind: type[torch.optim.Optimizer], parameters: list[nn.Parameter]) -> bool:
    """Whether `kind` has a fused kernel for the device and type of the parameters."""
    try:
        kind([torch.zeros(1, dtype=p.dtype, device=p.device) for p in parameters[:1]], fused=True)  # type: ignore[call-arg]
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict`, with the moments in the memory format of their parameters.

    Files keep tensors contiguous; fused kernels walk parameter and moments as they lie in memory,
    and would pair the wrong values of a channels_last weight.
    """
    optimizer.load_state_dict(dict(state))
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def lr_factor(step: int, total: int, steps_per_epoch: int, fit: FitConfig) -> float:
    """The factor on the peak learning rate at `step` (0 is the first) of `total` steps.

    Warm-up rises linearly to 1 and reaches it at its last step; the schedule takes over there:
    `cosine` falls to 0 at `total` (Loshchilov & Hutter, ICLR 2017, without restarts), `step`
    multiplies by `step_gamma` every `step_epochs` epochs counted from the start, `constant` stays.
    """
    warmup = round(fit.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if fit.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if fit.schedule == "step":
        return float(fit.step_gamma ** (step // (fit.step_epochs * steps_per_epoch)))
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
