"""Optimizers by name, with groups of parameters that have settings of their own."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.instantiate import check_arguments, locate
from trainer.engine.groups import LR_FACTOR, ParameterGroup, grouped, parse_groups
from trainer.errors import ConfigError

KERNEL_OPTIONS = {"fused", "foreach", "differentiable"}  # arguments that choose among kernels


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer class with its settings; `build` makes one for some parameters."""

    kind: type[torch.optim.Optimizer]
    options: Mapping[str, Any]  # keyword arguments of the class, `lr` included
    groups: Sequence[ParameterGroup] = ()  # parameters whose options differ

    @property
    def lr(self) -> float:
        """The peak learning rate of phases that set none."""
        return float(self.options["lr"])

    def build(
        self, parameters: Iterable[nn.Parameter], model: nn.Module | None = None
    ) -> torch.optim.Optimizer:
        """Make the optimizer, with torch's fused kernel if that is correct.

        Args:
            parameters: At least one; all on one device.
            model: To which they belong, for the groups; None: all have the same options.

        Raises:
            ConfigError: The class rejects a setting, or there is no parameter.
        """
        kind, options, parameters = self.kind, dict(self.options), list(parameters)
        if not parameters:
            raise ConfigError(
                "model: there is nothing to train, because none of its parameters requires a "
                "gradient; unfreeze some, or set fit.epochs=0"
            )
        wrong = _wrong_fused_types(kind, options, parameters)
        if options.get("fused") and wrong:
            raise ConfigError(
                f"optimizer.fused=true: torch's fused {kind.__name__} does not update parameters "
                f"of type {', '.join(wrong)} correctly; leave optimizer.fused out"
            )
        if not KERNEL_OPTIONS & options.keys() and not wrong and _has_fused(kind, parameters):
            options["fused"] = True
        try:
            groups = model is not None and grouped(model, parameters, self.groups)
            optimizer = kind(groups or parameters, **options)
            optimizer.register_step_pre_hook(_complete_momenta)
            return optimizer
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"optimizer: {kind.__name__} rejects its settings: {error}"
            ) from error


def parse_optimizer(
    settings: Mapping[str, Any], objects: Mapping[str, Any] | None = None
) -> OptimizerSpec:
    """Parse and check the settings of an optimizer.

    Args:
        settings: `_target_` (a subclass of torch.optim.Optimizer), its keyword arguments, and
            `groups` (see `trainer.engine.groups.parse_groups`).
        objects: Classes by dotted path that cannot be imported.

    Raises:
        ConfigError: The class is unknown, cannot be used for data-parallel training, does not
            know an argument, or rejects a value.
    """
    settings = dict(settings)
    groups = settings.pop("groups", {})
    kind = locate("optimizer", settings, objects or {})
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(
            f"optimizer._target_={settings['_target_']}: it is not a torch.optim.Optimizer"
        )
    check_arguments("optimizer", kind, settings)
    _check_supported(kind, str(settings["_target_"]))
    options = {key: value for key, value in settings.items() if key != "_target_"}
    lr = options.get("lr")
    if not isinstance(lr, int | float) or not math.isfinite(lr) or lr <= 0:
        raise ConfigError(f"optimizer.lr={lr!r}: it must be a number above 0")
    spec = OptimizerSpec(kind, options, parse_groups(groups, kind))
    spec.build([nn.Parameter(torch.zeros(1))])
    for group in spec.groups:
        try:
            OptimizerSpec(kind, {**options, **group.options}).build([nn.Parameter(torch.zeros(1))])
        except ConfigError as error:
            raise ConfigError(f"optimizer.groups.{group.name}: {error}") from error
    return spec


def _check_supported(kind: type[torch.optim.Optimizer], name: str) -> None:
    """Raise ConfigError for an optimizer that data-parallel training cannot drive."""
    if "closure" in _required_arguments(kind.step):
        raise ConfigError(
            f"optimizer._target_={name}: it evaluates the loss several times per step (a closure), "
            "which data-parallel training does not support"
        )
    if issubclass(kind, torch.optim.SparseAdam):
        raise ConfigError(
            f"optimizer._target_={name}: it needs sparse gradients, but gradients are averaged "
            "over the workers as dense tensors; use torch.optim.Adam"
        )


def _required_arguments(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments without a default value."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is inspect.Parameter.empty}


def _has_fused(kind: type[torch.optim.Optimizer], parameters: list[nn.Parameter]) -> bool:
    """Whether `kind` has a fused kernel for the devices and types of the parameters."""
    try:
        for dtype, device in {(p.dtype, p.device) for p in parameters}:
            kind([torch.zeros(1, dtype=dtype, device=device)], fused=True)  # type: ignore[call-arg]
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def _wrong_fused_types(
    kind: type[torch.optim.Optimizer], options: Mapping[str, Any], parameters: list[nn.Parameter]
) -> list[str]:
    """The types of parameters that the fused kernel of `kind` updates incorrectly.

    torch 2.13's fused SGD, for one, leaves bfloat16 and float16 parameters on the CPU as they are.
    Types below 32 bits are therefore tried: two steps must agree with those of the unfused kernel.
    """
    narrow = {(p.dtype, p.device) for p in parameters if p.dtype.itemsize < 4}
    if not narrow or not _has_fused(kind, parameters):
        return []
    plain = {key: value for key, value in options.items() if key not in KERNEL_OPTIONS}
    return sorted(
        str(dtype).removeprefix("torch.")
        for dtype, device in narrow
        if not _fused_agrees(kind, plain, dtype, device)
    )


def _fused_agrees(
    kind: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    # Small updates are visible only where the parameter is zero. 67 values: more than one vector
    # register, and a remainder.
    start = torch.linspace(-1, 1, 67, dtype=dtype, device=device)
    start[::2] = 0
    gradient = torch.linspace(0.5, 1.5, 67, dtype=dtype, device=device)
    results: list[Tensor] = []
    for fused in (True, False):
        parameter = nn.Parameter(start.clone())
        optimizer = kind([parameter], fused=fused, **options)  # type: ignore[call-arg]
        for _ in range(2):
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach().float())
    tolerance = 8 * torch.finfo(dtype).eps
    return torch.allclose(results[0], results[1], rtol=tolerance, atol=tolerance * options["lr"])


def _complete_momenta(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Give a momentum of zero to parameters whose first gradient comes after that of others.

    torch's fused SGD (2.13) raises an error where only some parameters have a momentum. From zero
    the first one is the gradient, as torch has it, times 1 - dampening, which torch leaves out.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"]:
            continue
        active = [p for p in group["params"] if p.grad is not None]
        without = [p for p in active if optimizer.state[p].get("momentum_buffer") is None]
        if len(without) < len(active):
            for parameter in without:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict`, with the moments in the memory format of their parameters.

    Files hold contiguous tensors. Fused kernels traverse a parameter and its moments in memory
    order, and would pair the wrong values where the parameter is channels_last.
    """
    optimizer.load_state_dict(dict(state))
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times the factor of the group."""
    for group in optimizer.param_groups:
        own = lr * group.get(LR_FACTOR, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own
